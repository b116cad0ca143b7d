"""A whole model with the adapter in its weights: PEFT's own merge, checked by loading what was written."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from dynlora.adapter_files.write import copy_processor
from dynlora.export.models import BaseModel, agreement, outputs
from dynlora.files import whole_folder
from dynlora.lora.components import embeddings_of

_UNTIED = "input and output embeddings are two weights now (tie_word_embeddings=false)"


def write_merged(
    source: Path, base: BaseModel, output: Path, *, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Load the base, merge the adapter into it, write it, load that, and compare outputs.

    Returns:
        ``max_difference``, ``max_output`` and ``note``, as ``Export`` has them.
    """
    if getattr(base.config, "quantization_config", None):
        raise ValueError(
            f"base={base.name!r} is quantised: an update cannot be added to its weights. Merge into the "
            "unquantised model, or serve the adapter beside this one (--to ragged)."
        )
    labels = _recorded_labels(source)
    model = base.adapted(source, dtype=dtype or "auto")
    _untie_(model)
    expected = outputs(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    first, second = _weights(merged)
    was_tied = getattr(base.config, "tie_word_embeddings", False)
    note = _UNTIED if was_tied and second is not None and first is not second else ""
    if len(labels) == merged.config.num_labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {name: i for i, name in enumerate(labels)}
    with whole_folder(output) as temporary:
        merged.save_pretrained(str(temporary))
        copy_processor(Path(str(base.name)), temporary)
        del model, merged
        written = base.builder.from_pretrained(str(temporary), dtype="auto")
        facts = agreement(expected, outputs(written), written.dtype)
    return {**facts, "note": note}


def _untie_(model: PeftModel) -> None:
    """Give a LoRA on tied embeddings a weight of its own: merged, it would change the other one, too."""
    base: Any = model.get_base_model()
    first, second = _weights(base)
    if first is None or first is not second:
        return
    for end in embeddings_of(base):
        if isinstance(end, LoraLayer):
            layer = end.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            for config in (base.config, base.config.get_text_config()):
                config.tie_word_embeddings = False
            return


def _weights(model: Any) -> list[Any]:
    return [getattr(end, "weight", None) for end in embeddings_of(model)]


def _recorded_labels(folder: Path) -> list[str]:
    """Class names that the run which left this adapter wrote beside it (``run.json``); [] for none."""
    file = folder / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged ({error}), so class names cannot be read; remove it to go without."
        ) from error
    return [str(label) for label in record.get("data", {}).get("labels") or ()]
