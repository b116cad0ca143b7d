"""A whole model with the adapter in its weights: PEFT's own merge, checked by loading what was written."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from dynlora.adapter_files.folder import checked_source, read_config, read_header
from dynlora.adapter_files.format import WEIGHTS_FILE
from dynlora.adapter_files.whole_folder import whole_folder
from dynlora.export.models import base_config, label_options, model_class, outputs

TOLERANCE = 1e-4
"""Of the largest output, in fp32: sums in another order differ by less, a wrong scale by far more."""

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)


@dataclass(frozen=True)
class Merged:
    """How a merge went.

    Attributes:
        max_difference: of outputs of the written model against the adapter on its base.
        max_output: largest absolute output of the latter.
        note: what has changed beside the weights; empty if nothing.
    """

    max_difference: float
    max_output: float
    note: str


def write_merged(
    source: Path,
    base: str,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    class_name: str | None = None,
) -> Merged:
    """Load the base, merge the adapter into it, write it, load that, and compare outputs.

    Args:
        source: folder of the adapter, any that PEFT loads.
        base: folder or hub id of the base model.
        output: folder to write to.
        dtype: of the weights; None takes the base's.
        class_name: of transformers, which loads the base; None finds it from task and config.

    Raises:
        FileNotFoundError: adapter or base are not there.
        ValueError: the base is quantised, or is not the adapter's.
        RuntimeError: the written model computes something else; nothing is left of it.
    """
    fields, config = read_config(checked_source(source)), base_config(base)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"base={base!r} is quantised: an update cannot be added to its weights. Merge into the "
            "unquantised model, or serve the adapter beside this one (--to ragged)."
        )
    shapes = {key: shape for key, (shape, _) in read_header(source / WEIGHTS_FILE).items()}
    labels = recorded_labels(source)
    build = model_class(fields, config, class_name)
    model = build.from_pretrained(base, dtype=dtype or "auto", **label_options(shapes, config))
    model = _adapted(model, source, base)
    note = _untie(model)
    expected = outputs(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    if not note and getattr(config, "tie_word_embeddings", False) and not _is_tied(merged):
        note = _UNTIED
    if len(labels) == merged.config.num_labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {name: i for i, name in enumerate(labels)}
    with whole_folder(output) as temporary:
        merged.save_pretrained(str(temporary))
        _copy_rest(Path(base), temporary)
        del model, merged
        found = outputs(build.from_pretrained(str(temporary), dtype="auto"))
        largest, difference = float(expected.abs().max()), float((found - expected).abs().max())
        _check(difference, largest, dtype or torch.float32, temporary)
    return Merged(difference, largest, note)


_UNTIED = "input and output embeddings are two weights now (tie_word_embeddings=false)"


def _adapted(model: nn.Module, source: Path, base: str) -> PeftModel:
    try:
        with warnings.catch_warnings():  # what it warns of, tied embeddings, is looked after below
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(source))
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"{source} does not fit on base={base!r} ({str(error).splitlines()[0][:200]}): this is not the "
            "adapter's base model, or not its class; name them (base, model_class)."
        ) from error


def _untie(model: PeftModel) -> str:
    """Give a LoRA on tied embeddings a weight of its own: merged, it would change the other one, too."""
    base: Any = model.get_base_model()
    ends = _ends(base)
    weights = [getattr(end, "weight", None) for end in ends]
    if weights[0] is None or weights[0] is not weights[1]:
        return ""
    for end in ends:
        if isinstance(end, LoraLayer):
            layer = end.get_base_layer()
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            for config in (base.config, base.config.get_text_config()):
                config.tie_word_embeddings = False
            return _UNTIED
    return ""


def _is_tied(model: Any) -> bool:
    weights = [getattr(end, "weight", None) for end in _ends(model)]
    return weights[1] is None or weights[0] is weights[1]


def _ends(model: Any) -> list[Any]:
    """Input and output embeddings, None for what the model has not."""
    found = []
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(getter())
        except NotImplementedError:  # of a model with two vocabularies, or none
            found.append(None)
    return found


def _check(difference: float, largest: float, dtype: torch.dtype, folder: Path) -> None:
    """Raise RuntimeError if a written model does not compute what the adapter on its base does."""
    stored = {d for _, d in _stored(folder)}
    coarsest = {"BF16": torch.bfloat16, "F16": torch.float16}
    kinds = [coarsest[d] for d in stored if d in coarsest] or [dtype]
    limit = max(TOLERANCE, *(4 * torch.finfo(kind).eps for kind in kinds)) * largest
    if not difference <= limit:
        raise RuntimeError(
            f"the merged model differs from the adapter on its base by {difference:.2g}, of outputs up to "
            f"{largest:.3g}: PEFT's merge_and_unload or the model's class loses a part of it. Nothing was "
            "written; serve the adapter beside its base (--to ragged), or name the class (model_class)."
        )


def _stored(folder: Path) -> list[tuple[tuple[int, ...], str]]:
    return [spec for file in folder.glob("*.safetensors") for spec in read_header(file).values()]


def _copy_rest(base: Path, folder: Path) -> None:
    """Tokenizer, processor and the like of a base folder, which the model's own files do not replace."""
    if not base.is_dir():
        return
    for file in sorted(base.iterdir()):
        is_rest = file.is_file() and not file.name.endswith(_WEIGHTS)
        if is_rest and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def recorded_labels(path: Path) -> Sequence[str]:
    """Class names that the run which left this adapter wrote beside it (``run.json``); [] for none.

    Raises:
        ValueError: the file is damaged.
    """
    file = path / "run.json"
    if not file.is_file():
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged ({error}), so class names cannot be read; remove it to go without."
        ) from error
    labels = record.get("data", {}).get("labels") if isinstance(record, dict) else None
    return [str(label) for label in labels] if isinstance(labels, list) else []
