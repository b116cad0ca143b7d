"""``dynlora export``: its options, and what it prints."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from dynlora.cli.terminal import Json, flag, guarded, print_json, quiet_libraries

if TYPE_CHECKING:
    from dynlora.export import Export


@guarded
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter.")],
    to: Annotated[
        Literal["ragged", "uniform", "merged"], typer.Option(help="Form; see below.")
    ] = "ragged",
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write.", show_default="ADAPTER-FORM"),
    ] = None,
    pad_to: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", min=1, help="Rank of uniform.", show_default="next of 8, 16, 32, …"
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of what is written.", show_default="as it is"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Base model: folder or id.", show_default="ADAPTER's"),
    ] = None,
    model_class: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Class that loads the base.", show_default="by task"),
    ] = None,
    verify: Annotated[bool, flag("--verify", "Load both and compare outputs.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as what a server reads; the adapter stays as it is.

    ragged: every module with its own rank (PEFT, transformers, vLLM,
    diffusers). uniform: one rank, padded with zeros (llama.cpp, SGLang,
    TGI, LoRAX). merged: the whole model, by PEFT's merge, always verified.

    For instance: dynlora export out --to uniform --verify
    dynlora export out --to merged --base models/roberta-base

    Exit code: 0 done, 1 verification failed, 2 wrong usage.
    """
    import torch

    from dynlora.export import export_adapter

    folder = output or adapter.with_name(f"{adapter.resolve().name}-{to}")
    verb = "Wrote over" if folder.is_dir() and any(folder.iterdir()) else "Wrote"
    with quiet_libraries():
        done = export_adapter(
            adapter,
            folder,
            to=to,
            pad_to=pad_to,
            dtype=getattr(torch, dtype) if dtype else None,
            base=base,
            model_class=model_class,
            verify=verify,
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        Console().print(Text("\n".join(_lines(done, verb))))


def _lines(done: "Export", verb: str) -> list[str]:
    from dynlora.report.inspection import inspect_adapter

    sizes = f"{_megabytes(done.source_bytes)} -> {_megabytes(done.num_bytes)}"
    padding = f", every module padded to rank {done.max_rank}" if done.form == "uniform" else ""
    lines = [f"{verb} {done.folder}: {done.form}, {sizes}{padding}"]
    if done.form == "ragged":
        lines.append(f"{done.modules} modules, ranks up to {done.max_rank}")
        if done.pruned_modules:
            lines.append(f"{done.pruned_modules} modules of rank 0 are left out")
    if done.max_difference is not None:
        lines.append(
            f"Against the source: max |Δ outputs| {done.max_difference:.2g}, of outputs up to "
            f"{done.max_output:.3g}"
        )
    lines += [done.note] if done.note else []
    if done.form != "merged":
        facts = inspect_adapter(done.folder)
        lines += [f"Served by {', '.join(facts.served_by)}", *filter(None, [facts.note])]
    return lines


def _megabytes(num_bytes: int) -> str:
    """Bytes for people.

    >>> _megabytes(512), _megabytes(81_000), _megabytes(8_100_000)
    ('512 bytes', '81 kB', '8.1 MB')
    """
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    return f"{num_bytes / 1e3:.3g} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.3g} MB"
