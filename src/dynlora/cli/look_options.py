"""Options of ``dynlora export``, ``inspect``, ``report`` and ``watch``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(export)
    app.command()(inspect)
    app.command()(report)
    app.command()(watch)


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
        str, typer.Option(metavar="RANK", help="Rank of uniform: 8, 16, 32, 64, or auto.")
    ] = "auto",
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
    verify: Annotated[
        bool,
        typer.Option("--verify", metavar="", help="Load both and compare outputs."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter as what a server reads; the adapter stays as it is.

    ragged: every module with its own rank (PEFT, transformers, vLLM,
    diffusers). uniform: one rank, padded with zeros (llama.cpp, SGLang,
    TGI, LoRAX). merged: the whole model, by PEFT's merge, always verified.

    For instance: dynlora export out --to uniform --verify
    dynlora export out --to merged --base models/roberta-base

    Exit code: 0 done, 1 verification failed, 2 wrong usage.
    """
    from dynlora.cli import look

    options = {"to": to, "output": output, "pad_to": pad_to, "dtype": dtype, "base": base}
    options["model_class"] = model_class
    raise typer.Exit(
        look.guarded(
            lambda: look.export(adapter, **options, verify=verify, as_json=as_json),  # type: ignore[arg-type]  # checked by typer
            debug=debug,
        )
    )


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter.")],
    effective: Annotated[
        bool,
        typer.Option("--effective", metavar="", help="Sizes by energy (reads weights)."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what an adapter holds, whoever trained it, and what can serve it.

    Reads its config and the header of its weights; no base model.
    --effective says what share of the update, by singular values, a
    smaller adapter would hold.

    For instance: dynlora inspect out
    dynlora inspect some-lora --effective --json

    Exit code: 0 done, 2 no adapter there, or a damaged one.
    """
    from dynlora.cli import look

    raise typer.Exit(
        look.guarded(
            lambda: look.inspect(adapter, effective=effective, as_json=as_json), debug=debug
        )
    )


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN ...", help="Folders of one or more runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page.", show_default="report.html in RUN"),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also the rank map, as .png or .svg.")
    ] = None,
    terminal_only: Annotated[
        bool, typer.Option("--terminal", metavar="", help="Print only, write no page.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what runs did: ranks over time, budget, importance, loss, memory.

    Writes one HTML file that loads nothing, and prints figures and final
    ranks. Several runs are compared (report.html is written here then).

    For instance: dynlora report out
    dynlora report runs/seed1 runs/seed2 --picture ranks.svg

    Exit code: 0 done, 2 no run there, or a damaged one.
    """
    from dynlora.cli import look

    raise typer.Exit(
        look.guarded(
            lambda: look.report(
                runs,
                output=output,
                picture=picture,
                terminal_only=terminal_only,
                as_json=as_json,
            ),
            debug=debug,
        )
    )


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Time between two looks.")] = 2,
    once: Annotated[bool, typer.Option("--once", metavar="", help="Print once and end.")] = False,
    debug: Debug = False,
) -> None:
    """Follow a run in the terminal until it ends, or Ctrl-C.

    For instance: dynlora watch out

    Exit code: 0 the run ended or Ctrl-C, 2 no run there.
    """
    from dynlora.cli import look

    raise typer.Exit(look.guarded(lambda: look.watch(run, every=every, once=once), debug=debug))
