"""From an adapter folder to what a consumer reads: ragged, uniform or merged."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from dynlora.adapter_files.folder import checked_source, read_config
from dynlora.adapter_files.format import CONFIG_FILE, WEIGHTS_FILE
from dynlora.adapter_files.updates import Adapter, read, refuse_rewriting_start
from dynlora.export import models
from dynlora.export.folder import checked_folder, write_adapter
from dynlora.export.forms import ragged, uniform
from dynlora.export.merge import write_merged

Form = Literal["ragged", "uniform", "merged"]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        form: ragged, uniform or merged.
        modules: adapted modules with at least one component; None for merged.
        pruned_modules: modules of rank 0, as far as they are known; None for merged.
        max_rank: largest rank that is written; None for merged.
        num_parameters: of the LoRA, without heads, zeros of padding included; None for merged.
        source_bytes, num_bytes: of config and weights that were read, and of all files written.
        seconds: wall time.
        max_difference: of outputs against the source; None if not verified.
        max_output: largest absolute output of the source, which the difference is to be seen against.
        note: what else is to be known; empty if nothing.
    """

    folder: str
    form: Form
    modules: int | None
    pruned_modules: int | None
    max_rank: int | None
    num_parameters: int | None
    source_bytes: int
    num_bytes: int
    seconds: float
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
        verify: whether to load source and export and compare their outputs on made-up inputs. A merged
            model is always verified.

    Raises:
        ValueError: source and output are one folder, the source cannot be exported, or an option does
            not belong to the form.
        FileNotFoundError: the source, or the base model that is needed, is not there.
        NotADirectoryError: ``output`` is a file.
        RuntimeError: a merged model does not compute what the adapter on its base does.
    """
    start = time.perf_counter()
    folder, source = checked_folder(output), checked_source(Path(source))
    if folder.resolve() == source.resolve():
        raise ValueError(f"output={str(output)!r} is the source; name another folder.")
    if pad_to is not None and to != "uniform":
        raise ValueError(f"pad_to={pad_to} belongs to the form uniform, not to {to}.")
    base = base or read_config(source).get("base_model_name_or_path")
    facts: dict[str, Any] = dict.fromkeys(
        ("modules", "pruned_modules", "max_rank", "num_parameters")
    )
    if to == "merged":
        done = write_merged(source, _named(base), folder, dtype=dtype, class_name=model_class)
        facts |= vars(done)
    else:
        adapter = read(source)
        refuse_rewriting_start(adapter)
        if to == "ragged":
            config, tensors, left_out = ragged(adapter)
        else:
            pruned = models.zero_updates(adapter, base, model_class)
            config, tensors, left_out = uniform(adapter, pruned, rank=pad_to)
        write_adapter(folder, config, {k: _as(t, dtype) for k, t in tensors.items()}, left_out)
        facts |= _figures(adapter, config, tensors)
        if verify:
            difference, largest = _compared(adapter, folder, _named(base), model_class)
            facts |= {"max_difference": difference, "max_output": largest}
    return Export(
        folder=str(folder),
        form=to,
        source_bytes=sum((source / n).stat().st_size for n in (CONFIG_FILE, WEIGHTS_FILE)),
        num_bytes=sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        seconds=round(time.perf_counter() - start, 3),
        **facts,
    )


def _named(base: str | None) -> str:
    if not base:
        raise ValueError(
            "the adapter does not name its base model; give its folder as base (--base)."
        )
    return base


def _figures(
    adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    factors = {key: t for key, t in tensors.items() if ".lora_" in key}
    written = sum("lora_A" in key or "lora_embedding_A" in key for key in factors)
    adapted = {*(u.name for u in adapter.updates), *adapter.pruned}
    live = sum(bool(u.contributing().any()) for u in adapter.updates)
    return {
        "modules": written,
        "pruned_modules": len(adapted) - live,
        "max_rank": config["r"],
        "num_parameters": sum(t.numel() for t in factors.values()),
    }


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    return cast.contiguous()


def _compared(
    adapter: Adapter, exported: Path, base: str, class_name: str | None
) -> tuple[float, float]:
    """Largest difference of the outputs of source and export on the base in fp32, and largest output."""
    config = models.base_config(base)
    build = models.model_class(adapter.stored, config, class_name)
    options = models.label_options({k: tuple(t.shape) for k, t in adapter.others.items()}, config)

    def loaded(folder: Path) -> Tensor:
        model = build.from_pretrained(base, dtype=torch.float32, **options)
        return models.outputs(PeftModel.from_pretrained(model, str(folder)))

    expected = loaded(adapter.folder)
    return float((loaded(exported) - expected).abs().max()), float(expected.abs().max())
