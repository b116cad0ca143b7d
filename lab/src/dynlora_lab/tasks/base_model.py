"""The pretrained model a run starts from, with the modules that are new in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.typed_fields import RecipeError


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The recipe's section ``base``: how the base model is loaded.

    Attributes:
        dtype: of its weights.
        revision: branch, tag or commit on the hub.
        attn_implementation: such as ``sdpa`` or ``flash_attention_2``; None: transformers' choice.
        trust_remote_code: whether code that comes with the model may run.
        quantization: fields of transformers' BitsAndBytesConfig, such as ``load_in_4bit: true``;
            None: not quantised.
    """

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None

    def arguments(self, *, head: Sequence[str] = ()) -> dict[str, Any]:
        """The same as arguments of ``from_pretrained``.

        Args:
            head: modules that are trained themselves, which a quantised one cannot be; transformers
                spares a head by itself only where its last layer has no bias.
        """
        named = {
            "revision": self.revision,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code or None,
            "quantization_config": self._quantization(head),
        }
        return {"dtype": self.dtype} | {k: v for k, v in named.items() if v is not None}

    def _quantization(self, head: Sequence[str]) -> BitsAndBytesConfig | None:
        if not self.quantization:
            return None
        spared = [*(self.quantization.get("llm_int8_skip_modules") or []), *head]
        return BitsAndBytesConfig(**{**self.quantization, "llm_int8_skip_modules": spared or None})


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Where the base model comes from and how it is loaded.

    Attributes:
        name: hub id or folder.
        load: how; only what tells where the files are matters to a skeleton.
        is_skeleton: models are shapes on the meta device: for counting, not for running.
    """

    name: str
    load: BaseOptions = field(default_factory=BaseOptions)
    is_skeleton: bool = False

    def config(self, **fields: Any) -> PreTrainedConfig:
        """The model's configuration with ``fields`` changed; the only file that is read.

        Raises:
            RecipeError: there is no such model.
        """
        try:
            return AutoConfig.from_pretrained(self.name, **self._source(), **fields)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model {self.name!r} cannot be read: {error}") from error

    def tokenizer(self, **options: Any) -> Tokenizer:
        """The model's tokenizer; one without a padding token pads with its end-of-text token.

        Raises:
            RecipeError: the model has none.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self._source(), **options)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"model {self.name!r} has no tokenizer that can be read: {error}"
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self, auto_class: Any, **fields: Any) -> tuple[PreTrainedModel, list[str]]:
        """A model of ``auto_class`` with ``fields`` changed in its configuration.

        Args:
            auto_class: such as AutoModelForSequenceClassification.
            fields: of the configuration, such as num_labels.

        Returns:
            The model, and the names of its modules with newly drawn weights, sorted: the head and
            whatever else the checkpoint lacks (a skeleton knows only the head).

        Raises:
            RecipeError: the architecture has no such head.
        """
        config = self.config(**fields)
        if type(config) not in auto_class._model_mapping:
            raise RecipeError(
                f"model {self.name!r} is a {config.model_type}, for which transformers has no "
                f"{auto_class.__name__}: name a model whose head fits the task."
            )
        if self.is_skeleton:
            return _skeleton(auto_class, config)
        head = _skeleton(auto_class, config)[1] if self.load.quantization else []
        model, loading = auto_class.from_pretrained(
            self.name,
            config=config,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced
            output_loading_info=True,
            **self.load.arguments(head=head),
        )
        drawn = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
        return model, sorted({key.rpartition(".")[0] for key in drawn})

    def _source(self) -> dict[str, Any]:
        keep = ("revision", "trust_remote_code")
        return {k: v for k, v in self.load.arguments().items() if k in keep}


def _skeleton(auto_class: Any, config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """A model without weights, and the names of the modules of its head."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return model, outside_the_trunk(model)


def outside_the_trunk(model: PreTrainedModel) -> list[str]:
    """Modules with weights beside the pretrained trunk, the output embeddings excepted.

    The trunk is the attribute that ``base_model_prefix`` names. Some models have none (T5's and mT5's
    for conditional generation hold encoder and decoder themselves): there it is every module that the
    architecture's bare model has too.
    """
    prefix = model.base_model_prefix
    is_nested = model.base_model is not model
    bare = set() if is_nested else _module_names(model.config)
    output = model.get_output_embeddings()
    return sorted(
        name
        for name, module in model.named_modules()
        if name
        and not (f"{name}.".startswith(f"{prefix}.") if is_nested else name in bare)
        and module is not output
        and any(True for _ in module.parameters(recurse=False))
    )


def _module_names(config: PreTrainedConfig) -> set[str]:
    """Names of the modules of the architecture's model without a head."""
    with torch.device("meta"):
        bare = AutoModel.from_config(config)
    return {name for name, _ in bare.named_modules()}
