"""``dynlora inspect``, ``report`` and ``watch``: their options, and what they print."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import Json, flag, guarded, print_json

if TYPE_CHECKING:
    from dynlora.report.inspection import AdapterFacts


@guarded
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter.")],
    config_for: Annotated[
        Literal["peft", "axolotl", "llama-factory", "ms-swift", "kohya"] | None,
        typer.Option(metavar="TOOL", help="Print what trains these ranks there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter holds, whoever trained it, and what can serve it.

    Reads its config and the header of its weights; no base model. How much
    smaller it could be: dynlora shrink ADAPTER

    --config-for prints what to paste for the next run instead, for peft,
    axolotl, llama-factory, ms-swift or kohya.

    For instance: dynlora inspect out
    dynlora inspect some-lora --config-for axolotl

    Exit code: 0 done, 2 no adapter there, or a damaged one.
    """
    if config_for is not None:
        from dynlora.report.next_run import settings_for

        typer.echo(settings_for(config_for, adapter))
        return
    from dynlora.report.inspection import inspect_adapter

    facts = inspect_adapter(adapter)
    if as_json:
        print_json(dataclasses.asdict(facts))
    else:
        console = Console()
        console.print(_facts_view(facts, width=console.width))


@guarded
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
    terminal_only: Annotated[bool, flag("--terminal", "Print only, write no page.")] = False,
    as_json: Json = False,
) -> None:
    """Show what runs did: ranks over time, budget, importance, loss.

    Writes one HTML file that loads nothing, and prints figures and final
    ranks. Several runs are compared (report.html is written here then).

    For instance: dynlora report out
    dynlora report runs/seed1 runs/seed2 --picture ranks.svg

    Exit code: 0 done, 2 no run there, or a damaged one.
    """
    from dynlora.report.conclusion import summary_row
    from dynlora.report.run import read_runs
    from dynlora.report.terminal import report_view

    loaded = read_runs(runs)
    written: list[Path] = []
    if not terminal_only:
        from dynlora.report.page import write_page

        place = output or (loaded[0].folder if len(loaded) == 1 else Path()) / "report.html"
        written.append(write_page(loaded, place, version=version("dynlora")))
    if picture is not None:
        from dynlora.report.charts import write_picture

        for run in loaded:
            suffix = "" if len(loaded) == 1 else f"-{run.name.replace('/', '-')}"
            written.append(write_picture(run, picture.with_stem(picture.stem + suffix)))
    if as_json:
        rows = [summary_row(run) | {"ranks": run.ranks} for run in loaded]
        print_json({"runs": rows, "written": [str(path) for path in written]})
        return
    console = Console()
    console.print(report_view(loaded, width=console.width))
    for path in written:
        console.print(Text(f"Wrote {path}"))


@guarded
def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="Time between two looks.")
    ] = 2,
    once: Annotated[bool, flag("--once", "Print once and end.")] = False,
) -> None:
    """Follow a run in the terminal until it ends, or Ctrl-C.

    For instance: dynlora watch out

    Exit code: 0 the run ended or Ctrl-C, 2 no run there.
    """
    from dynlora.report.run import read_run
    from dynlora.report.terminal import report_view

    console = Console()
    run = read_run(folder)
    if once:
        console.print(report_view([run], width=console.width))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        live.update(report_view([run], width=console.width), refresh=True)
        while not run.is_finished:
            time.sleep(every)
            run = read_run(folder)
            live.update(report_view([run], width=console.width), refresh=True)


def _facts_view(facts: "AdapterFacts", *, width: int) -> RenderableType:
    from dynlora.report.terminal import rank_grid

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_row("adapter", f"{facts.kind}, {facts.folder}")
    table.add_row("base model", facts.base_model or "not named")
    if facts.target_r is not None:
        table.add_row("budget", f"init_r {facts.init_r}, target_r {facts.target_r:g}")
    table.add_row("ranks", _rank_spread(list(facts.ranks.values())))
    table.add_row("parameters", f"{facts.num_parameters:,} ({', '.join(facts.dtypes)})")
    table.add_row("file", f"{facts.num_bytes:,} bytes; tensors beside the LoRA: {facts.heads}")
    low, high = facts.scales
    table.add_row("scaling", f"{low:g}" if low == high else f"{low:g} to {high:g}")
    table.add_row("served by", ", ".join(facts.served_by) or "nothing as it is")
    if facts.note:
        table.add_row("", facts.note)
    largest = max([1, facts.init_r or 0, *facts.ranks.values()])
    of = "at most" if facts.init_r is None else "at the start"
    return Group(table, Text(), rank_grid(facts.ranks, init_r=largest, width=width, of=of))


def _rank_spread(ranks: Sequence[int]) -> str:
    """Ranks of the modules in one line: of those alive, and how many are not."""
    alive = [rank for rank in ranks if rank]
    total = f"{sum(ranks):,} components"
    if len(set(ranks)) == 1:
        return f"{ranks[0]} in every module, {total}"
    spread = f"{min(alive, default=0)} to {max(alive, default=0)}"
    line = f"{spread}, mean {sum(ranks) / max(len(ranks), 1):.3g}, {total}"
    dead = len(ranks) - len(alive)
    return f"{line}; {dead} of {len(ranks)} modules at 0" if dead else line
