"""From an adapter folder to what a consumer reads: ragged, uniform or merged."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dynlora.export.base_files import BaseFiles, name_map, open_base, weight_key
from dynlora.export.folder import checked_folder, write_adapter
from dynlora.export.layout import Shapes, ragged, uniform
from dynlora.export.merged import write_merged
from dynlora.export.source import PlainAdapter, read_adapter, recorded_labels
from dynlora.export.verify import compare_outputs

Form = Literal["ragged", "uniform", "merged"]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        form: ragged, uniform or merged.
        modules: adapted modules with at least one component.
        dead_modules: adapted modules of rank 0.
        max_rank: largest rank that is written; of the source, for merged.
        num_parameters: of the LoRA, without heads; zeros of padding included.
        num_bytes: of all files in the folder.
        seconds: wall time, without verification.
        max_difference: of outputs against the source; None if not verified.
        max_output: largest absolute output of the source, which the difference is to be seen against.
    """

    folder: str
    form: Form
    modules: int
    dead_modules: int
    max_rank: int
    num_parameters: int
    num_bytes: int
    seconds: float
    max_difference: float | None = None
    max_output: float | None = None


# Long for its docstring: the one door of the room, whose arguments and errors a caller must know.
def export_adapter(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: Form = "ragged",
    pad_to: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    verify: bool = False,
) -> Export:
    """Write an adapter folder in another form; the source is not changed.

    Args:
        source: folder of a native checkpoint, a finished adapter, or any plain LoRA.
        output: folder to write to, another than ``source``.
        to: ragged (own rank in every module: PEFT, transformers, vLLM, diffusers), uniform (one padded
            rank: llama.cpp, SGLang, TGI, LoRAX, MLX, older vLLM), or merged (a whole model).
        pad_to: common rank of uniform; None takes the next of 8, 16, 32, 64, …
        dtype: of what is written; None keeps the source's, or the base's.
        base: folder (or, for verification, hub id) of the base model; the one that the adapter names,
            if not given.
        verify: whether to load source and export with stock PEFT and compare their outputs.

    Raises:
        ValueError: source and output are one folder, the source cannot be exported, or an option does
            not belong to the form.
        FileNotFoundError: the source, or the base model that is needed, is not there.
        NotADirectoryError: ``output`` is a file.
    """
    start = time.perf_counter()
    folder = checked_folder(output)
    if folder.resolve() == Path(source).resolve():
        raise ValueError(f"output={str(output)!r} is the source; name another folder.")
    if pad_to is not None and to != "uniform":
        raise ValueError(f"pad_to={pad_to} belongs to the form uniform, not to {to}.")
    adapter = read_adapter(source)
    base = base or adapter.fields.get("base_model_name_or_path")
    parameters = sum(a.numel() + b.numel() for a, b in adapter.factors.values())
    largest = max(adapter.ranks.values())
    if to == "merged":
        labels = recorded_labels(source)
        write_merged(adapter, open_base(_named(base)), folder, dtype=dtype, labels=labels)
    else:
        if to == "ragged":
            config, tensors = ragged(adapter, dtype=dtype)
        else:
            shapes = _base_shapes(adapter, base)
            config, tensors = uniform(adapter, rank=pad_to, shapes=shapes, dtype=dtype)
        write_adapter(folder, config, tensors)
        parameters = sum(t.numel() for key, t in tensors.items() if ".lora_" in key)
        largest = config.r
    seconds = time.perf_counter() - start
    difference = largest_output = None
    if verify:
        difference, largest_output = compare_outputs(
            adapter, Path(source), folder, base=_named(base), merged=to == "merged"
        )
    return Export(
        folder=str(folder),
        form=to,
        modules=len(adapter.factors),
        dead_modules=len(adapter.dead),
        max_rank=largest,
        num_parameters=parameters,
        num_bytes=sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        seconds=round(seconds, 3),
        max_difference=difference,
        max_output=largest_output,
    )


def _named(base: str | None) -> str:
    if not base:
        raise ValueError(
            "the adapter does not name its base model; give its folder as base (--base)."
        )
    return base


def _base_shapes(adapter: PlainAdapter, base: str | None) -> Shapes:
    """Weight shapes of modules of rank 0, from the base's headers; {} where it is not at hand."""
    if not adapter.dead or not base or not Path(base).is_dir():
        return {}
    files = open_base(base)
    rule, _ = name_map(adapter.factors, files)
    return {n: s for n in adapter.dead if (s := _shape(weight_key(n, rule, files), files))}


def _shape(key: str | None, base: BaseFiles) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if key is None:
        return None
    out, *inner = base.specs(base.shard_of[key])[key].shape
    return tuple(inner), (out, *[1] * (len(inner) - 1))
