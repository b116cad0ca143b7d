"""From an adapter folder to what a consumer reads: ragged, uniform or merged."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dynlora.adapter_files.folder import checked_source, read_config
from dynlora.adapter_files.format import CONFIG_FILE, WEIGHTS_FILE
from dynlora.adapter_files.updates import Adapter, Update, read
from dynlora.adapter_files.write import plain, write_adapter
from dynlora.export.merge import write_merged
from dynlora.export.models import BaseModel, agreement, outputs, zero_updates
from dynlora.export.plain import checked_folder
from dynlora.files import whole_folder

Form = Literal["ragged", "uniform", "merged"]

PAD_STEPS = (8, 16, 32, 64, 128, 256, 512)
"""Ranks that servers with one rank an adapter take (vLLM's list of allowed maximum ranks, without 1
and 320; LoRAX and TGI want multiples of 8)."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        form: ragged, uniform or merged.
        source_bytes, num_bytes: of config and weights that were read, and of all files written.
        seconds: wall time.
        modules: adapted modules with at least one component; None for merged.
        pruned_modules: modules of rank 0, as far as they are known; None for merged.
        max_rank: largest rank that is written; None for merged.
        num_parameters: of the LoRA, without heads, zeros of padding included; None for merged.
        max_difference: of outputs against the source; None if not verified.
        max_output: largest absolute output of the source, which the difference is to be seen against.
        note: what else is to be known; empty if nothing.
    """

    folder: str
    form: Form
    source_bytes: int
    num_bytes: int
    seconds: float
    modules: int | None = None
    pruned_modules: int | None = None
    max_rank: int | None = None
    num_parameters: int | None = None
    max_difference: float | None = None
    max_output: float | None = None
    note: str = ""


def export_adapter(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: Form = "ragged",
    pad_to: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    model_class: str | None = None,
    verify: bool = False,
) -> Export:
    """Write an adapter folder in another form; the source is not changed.

    Args:
        source: folder of a checkpoint, a finished adapter, or any plain LoRA.
        output: folder to write to, another than ``source``.
        to: ragged (own rank in every module: PEFT, transformers, vLLM, diffusers), uniform (one padded
            rank: llama.cpp, SGLang, TGI, LoRAX, MLX, older vLLM), or merged (a whole model, by PEFT's
            merge).
        pad_to: common rank of uniform; None takes the next of 8, 16, 32, 64, …
        dtype: of what is written; None keeps the source's, or the base's.
        base: folder or hub id of the base model; the one that the adapter names, if not given.
        model_class: of transformers, which loads the base; found from task and config if not given.
        verify: whether to load source and export and compare their outputs on made-up inputs before the
            folder gets its name. A merged model is always verified.

    Raises:
        ValueError: source and output are one folder, the source cannot be exported, or an option does
            not belong to the form.
        FileNotFoundError: the source, or the base model that is needed, is not there.
        NotADirectoryError: ``output`` is a file.
        VerificationError: what was written does not compute what the source does.
    """
    start = time.perf_counter()
    folder, source = checked_folder(output), checked_source(Path(source))
    if folder.resolve() == source.resolve():
        raise ValueError(f"output={str(output)!r} is the source; name another folder.")
    if pad_to is not None and to != "uniform":
        raise ValueError(f"pad_to={pad_to} belongs to the form uniform, not to {to}.")
    stored = read_config(source)
    model = BaseModel(base or stored.get("base_model_name_or_path"), stored, model_class)
    if to == "merged":
        facts = write_merged(source, model, folder, dtype=dtype)
    else:
        facts = _write_lora(source, model, folder, rank=pad_to, form=to, dtype=dtype, verify=verify)
    return Export(
        folder=str(folder),
        form=to,
        source_bytes=sum((source / n).stat().st_size for n in (CONFIG_FILE, WEIGHTS_FILE)),
        num_bytes=sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        seconds=round(time.perf_counter() - start, 3),
        **facts,
    )


def _write_lora(
    source: Path, model: BaseModel, folder: Path, *,
    form: Form, rank: int | None, dtype: torch.dtype | None, verify: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write one of the two forms of a plain LoRA; figures by their name in ``Export``."""
    adapter = read(source)
    if form == "ragged":
        written = adapter.without_zeros()
    else:
        written = _uniform(adapter, zero_updates(adapter, model), rank=rank)
    written = written.unscaled()
    fields, tensors = plain(written, lists_only=form == "uniform")
    facts: dict[str, Any] = {}
    with whole_folder(folder) as temporary:
        tensors = {key: _as(tensor, dtype) for key, tensor in tensors.items()}
        write_adapter(temporary, fields, tensors, written.pruned)
        if verify:
            expected, found = (outputs(model.adapted(f)) for f in (source, temporary))
            facts |= agreement(expected, found, dtype or torch.float32)
    live = sum(bool(update.contributing().any()) for update in adapter.updates)
    known = {*(update.name for update in adapter.updates), *adapter.pruned}
    return facts | {
        "modules": len(written.updates),
        "pruned_modules": len(known) - live,
        "max_rank": fields["r"],
        "num_parameters": sum(u.a.numel() + u.b.numel() for u in written.updates),
    }


def _uniform(adapter: Adapter, pruned: dict[str, Update], *, rank: int | None) -> Adapter:
    """All modules with one rank; zeros fill up, in those of ``adapter.pruned`` too."""
    live = adapter.without_zeros()
    largest = max(update.rank for update in live.updates)
    rank = padded_rank(largest) if rank is None else rank
    if rank < largest:
        raise ValueError(
            f"pad_to={rank} is below the largest rank of the adapter, {largest}: padding only adds zero "
            f"components. Take {padded_rank(largest)}, or leave it out."
        )
    by_name = {u.name: u.taken(torch.arange(0)) for u in adapter.updates} | pruned
    by_name |= {u.name: u for u in live.updates}
    updates = tuple(by_name[name].padded(rank) for name in sorted(by_name))
    return dataclasses.replace(live, updates=updates, pruned=())


def padded_rank(largest: int) -> int:
    """The next of ``PAD_STEPS`` that holds ``largest``; beyond them the next multiple of 64.

    >>> [padded_rank(r) for r in (1, 8, 9, 600)]
    [8, 8, 16, 640]
    """
    return next((step for step in PAD_STEPS if step >= largest), -(-largest // 64) * 64)


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    return cast.contiguous()
