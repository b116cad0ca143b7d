"""Base models as transformers loads them, and their outputs on made-up inputs."""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import dynlora.gated  # noqa: F401  # lets PEFT load checkpoints with gates
from dynlora.adapter_files.folder import read_header
from dynlora.adapter_files.format import WEIGHTS_FILE, by_module
from dynlora.adapter_files.updates import Adapter, Update
from dynlora.errors import VerificationError

TOLERANCE = 1e-4
"""Of the largest output, in fp32: sums in another order differ by less, a wrong scale by far more."""

_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

_OUTPUTS = ("logits", "start_logits", "last_hidden_state")

_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""What the names of heads end with whose rows are a classifier's labels."""


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was trained on.

    Attributes:
        name: its folder or hub id; None if nobody says it.
        fields: of the adapter's config.
        class_name: of transformers, which loads it; None finds it from task and config.
        arguments: what the caller calls the name and, where it can be given, the class.
    """

    name: str | None
    fields: Mapping[str, Any]
    class_name: str | None = None
    arguments: tuple[str, ...] = ("base", "model_class")

    @cached_property
    def config(self) -> Any:
        """Its config."""
        if not self.name:
            raise ValueError(
                "the adapter does not name its base model; give its folder as base (--base)."
            )
        try:
            return transformers.AutoConfig.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.arguments[0]}={self.name!r} is not a model that transformers can load "
                f"({str(error).splitlines()[0]}). Name its folder, or its hub id if it is in the cache."
            ) from error

    @cached_property
    def builder(self) -> Any:
        """The class that loads it."""
        mapping = self.fields.get("auto_mapping") or {}
        library = str(mapping.get("parent_library", "transformers"))
        holder: Any = transformers
        name = self.class_name
        if name is None:
            name = mapping.get("base_model_class") or _BY_TASK.get(
                str(self.fields.get("task_type"))
            )
            if mapping and library.startswith("transformers"):
                holder = importlib.import_module(library)
        if name is None:
            named = self.config.architectures or ()
            name = next((n for n in named if hasattr(transformers, n)), "AutoModel")
        if not hasattr(holder, name):
            raise ValueError(
                f"model_class={name!r} is not a class of transformers: name the one that loads the base "
                "model, such as AutoModelForCausalLM."
            )
        return getattr(holder, name)

    def adapted(self, folder: Path, *, dtype: torch.dtype | str = torch.float32) -> PeftModel:
        """The model with the adapter of a folder as PEFT loads it; its head brings its number of labels."""
        config, header = self.config, read_header(folder / WEIGHTS_FILE)
        rows = [shape[0] for key, (shape, _) in header.items() if key.endswith(_HEADS)]
        is_other = rows and rows[0] != config.num_labels
        labels = {"num_labels": rows[0]} if is_other else {}
        model = self.builder.from_pretrained(self.name, dtype=dtype, **labels)
        try:
            with warnings.catch_warnings():  # what it warns of, tied embeddings, is looked after
                warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings")
                warnings.filterwarnings("error", message="Found missing adapter keys")
                return PeftModel.from_pretrained(model, str(folder)).eval()
        except (RuntimeError, ValueError, UserWarning) as error:
            raise ValueError(
                f"{folder} does not fit on {self.arguments[0]}={self.name!r} "
                f"({str(error).splitlines()[0][:200]}): this is not the adapter's base model, or not "
                f"of its class; name the right one ({', '.join(self.arguments)})."
            ) from error


def zero_updates(adapter: Adapter, base: BaseModel) -> dict[str, Update]:
    """Updates of rank 0 for the pruned modules of an adapter, by name.

    Shapes and kinds are those that PEFT gives them in the base model, which is built without weights.
    """
    if not adapter.pruned:
        return {}
    if not base.name:
        raise ValueError(
            f"module {adapter.pruned[0]!r} fell to rank 0 and only its base model tells its shape; name "
            "it: base=..., --base."
        )
    lora = LoraConfig(
        r=1,
        target_modules=list(adapter.pruned),
        fan_in_fan_out=bool(adapter.fields.get("fan_in_fan_out")),
    )
    with torch.device("meta"):
        build = getattr(base.builder, "from_config", None) or base.builder._from_config
        model = get_peft_model(build(base.config), lora)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    dtype, updates = adapter.updates[0].a.dtype, {}
    for name, keys in by_module(tensors)[0].items():
        a, b = (torch.zeros(tuple(tensors[keys[part]].shape), dtype=dtype) for part in "AB")
        is_embedding = "lora_embedding_" in keys["A"]
        updates[name] = Update(name, a, b, 1.0, is_embedding).taken(torch.arange(0))
    return updates


def agreement(expected: Tensor, found: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of outputs, and largest output; an error beyond ``dtype``'s rounding."""
    largest = float(expected.abs().max())
    difference = float((found.to(expected) - expected).abs().max())
    if not difference <= max(TOLERANCE, 8 * torch.finfo(dtype).eps) * largest:
        raise VerificationError(
            f"verification failed: what was written, loaded again, differs from the adapter on its base by "
            f"{difference:.2g}, of outputs up to {largest:.3g}. Nothing was written."
        )
    return {"max_difference": difference, "max_output": largest}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """What a model says to random tokens, pictures or sounds, in fp32."""
    output = model.eval()(**_inputs(model))
    return next(output[name] for name in _OUTPUTS if name in output).float()


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    draws = torch.Generator().manual_seed(0)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = getattr(base, "main_input_name", "input_ids")
    weight = next(p for p in model.parameters() if p.is_floating_point())
    if name == "input_ids" and getattr(text, "vocab_size", None):
        ids = torch.randint(1, text.vocab_size, (2, 16), generator=draws).to(weight.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    shape = _sizes(name, config)
    if shape is None:
        raise ValueError(
            f"model={type(base).__name__} takes {name!r}, which cannot be made up here, so its outputs "
            "cannot be compared. Do it in a script: PeftModel.from_pretrained(base, folder)"
            ".merge_and_unload(), then compare outputs on data of your own."
        )
    inputs = {name: torch.randn(2, *shape, generator=draws).to(weight)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(1, text.vocab_size, (2, 8), generator=draws)
    return inputs


def _sizes(name: str, config: Any) -> tuple[int, ...] | None:
    """Sizes of one picture (channels, height, width), spectrogram (bins, frames) or sound (samples,)."""
    if name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return getattr(config, "num_channels", 3), height, width
    if name == "input_features" and getattr(config, "max_source_positions", None):
        return config.num_mel_bins, 2 * config.max_source_positions
    return (16000,) if name == "input_values" else None
