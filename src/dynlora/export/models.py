"""Base models as transformers loads them, and their outputs on made-up inputs."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from dynlora.adapter_files.format import parse_key
from dynlora.adapter_files.updates import Adapter, Update

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


def model_class(fields: Mapping[str, Any], config: Any, name: str | None = None) -> Any:
    """The class of transformers that loads an adapter's base model.

    Args:
        fields: of the adapter's config.
        config: of the base model.
        name: of the class, if the user says it.

    Raises:
        ValueError: transformers has no class of that name.
    """
    mapping = fields.get("auto_mapping") or {}
    library = str(mapping.get("parent_library", "transformers"))
    holder: Any = transformers
    if name is None:
        name = mapping.get("base_model_class") or _BY_TASK.get(str(fields.get("task_type")))
        if mapping and library.startswith("transformers"):
            holder = importlib.import_module(library)
    if name is None:
        name = next(
            (n for n in config.architectures or () if hasattr(transformers, n)), "AutoModel"
        )
    found = getattr(holder, name, None)
    if found is None:
        raise ValueError(
            f"model_class={name!r} is not a class of transformers: name the one that loads the base model, "
            "such as AutoModelForCausalLM."
        )
    return found


def base_config(base: str) -> Any:
    """The config of a base model, by folder or hub id.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"base={base!r} is not a model that transformers can load ({str(error).splitlines()[0]}). Name "
            "its folder, or its hub id if it is in the cache."
        ) from error


def label_options(keys: Mapping[str, tuple[int, ...]], config: Any) -> dict[str, int]:
    """The number of labels, where the adapter brings a head of another size than the base's config says.

    Args:
        keys: shapes of the adapter's tensors.
        config: of the base model.
    """
    rows = [shape[0] for key, shape in keys.items() if key.endswith(_HEADS)]
    return {"num_labels": rows[0]} if rows and rows[0] != config.num_labels else {}


def zero_updates(adapter: Adapter, base: str | None, class_name: str | None) -> dict[str, Update]:
    """Updates of rank 0 for the pruned modules of an adapter, by name.

    Their shapes, keys and kinds are those that PEFT gives them in the base model, which is built
    without weights.

    Raises:
        ValueError: there are such modules and the base model is not at hand, or has no such module.
    """
    if not adapter.pruned:
        return {}
    if not base:
        raise ValueError(
            f"module {adapter.pruned[0]!r} fell to rank 0 and only its base model tells its shape; name "
            "it: base=..., --base."
        )
    config = base_config(base)
    builder = model_class(adapter.stored, config, class_name)
    lora = LoraConfig(
        r=1,
        target_modules=list(adapter.pruned),
        fan_in_fan_out=bool(adapter.stored.get("fan_in_fan_out")),
    )
    with torch.device("meta"):
        build = getattr(builder, "from_config", None) or builder._from_config
        model = get_peft_model(build(config), lora)
    found: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if (parsed := parse_key(key)) is not None:
            found.setdefault(parsed.module, {})[parsed.part] = tensor
            embeddings |= {parsed.module} if parsed.is_embedding else set()
    dtype = adapter.updates[0].a.dtype
    updates = {}
    for name, parts in found.items():
        a, b = (torch.zeros(tuple(parts[p].shape), dtype=dtype) for p in ("A", "B"))
        updates[name] = Update(name, a, b, 1.0, name in embeddings).taken(torch.arange(0))
    return updates


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """What a model says to random tokens, pictures or sounds, in fp32.

    Raises:
        ValueError: it takes something else.
    """
    output = model.eval()(**_inputs(model))
    return next(output[name] for name in _OUTPUTS if name in output).float()


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    draws = torch.Generator().manual_seed(0)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    name = getattr(base, "main_input_name", "input_ids")
    if name == "input_ids" and getattr(text, "vocab_size", None):
        ids = torch.randint(1, text.vocab_size, (2, 16), generator=draws)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    shape = _sizes(name, config)
    if shape is None:
        raise ValueError(
            f"model={type(base).__name__} takes {name!r}, which cannot be made up here, so its outputs "
            "cannot be compared. Do it in a script: PeftModel.from_pretrained(base, folder)"
            ".merge_and_unload(), then compare outputs on data of your own."
        )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {name: torch.randn(2, *shape, generator=draws).to(dtype)}
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
