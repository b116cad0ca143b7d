"""``dynlora export``, ``inspect``, ``report`` and ``watch``: what comes out of a run."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import FAILED, USER_MISTAKE, print_error, report_error

VERIFY_TOLERANCE = 1e-4  # of the largest output, in fp32; a wrong scale is off by far more


def guarded(action: Callable[[], int], *, debug: bool) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        return action()
    except ModuleNotFoundError as error:
        if debug:
            raise
        print_error(f"this needs {error.name}; pip install 'dynlora[report]'")
        return USER_MISTAKE
    except (ValueError, OSError) as error:
        return report_error(error, code=USER_MISTAKE, debug=debug)


def export(
    adapter: Path,
    *,
    to: str,
    output: Path | None,
    pad_to: str,
    dtype: str | None,
    base: str | None,
    model_class: str | None,
    verify: bool,
    as_json: bool,
) -> int:
    """Write an adapter in another form; 1 if verification finds a difference."""
    import torch

    from dynlora.cli.terminal import quiet_libraries
    from dynlora.export import export_adapter

    if pad_to != "auto" and not pad_to.isdigit():
        raise ValueError(f"--pad-to {pad_to!r} must be a rank such as 8, 16, 32, 64, or 'auto'.")
    folder = output or adapter.with_name(f"{adapter.resolve().name}-{to}")
    verb = "Wrote over" if folder.is_dir() and any(folder.iterdir()) else "Wrote"
    try:
        with quiet_libraries():
            done = export_adapter(
                adapter,
                folder,
                to=to,  # type: ignore[arg-type]  # typer has checked it
                pad_to=None if pad_to == "auto" else int(pad_to),
                dtype=getattr(torch, dtype) if dtype else None,
                base=base,
                model_class=model_class,
                verify=verify,
            )
    except RuntimeError as error:
        print_error(f"check failed: {error}")
        return FAILED
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        Console().print(Text("\n".join(_export_lines(done, verb))))
    limit = VERIFY_TOLERANCE * (done.max_output or 0)
    if to != "merged" and done.max_difference is not None and not done.max_difference <= limit:
        print_error(f"check failed: outputs differ by {done.max_difference:.2g}")
        return FAILED
    return 0


def _export_lines(done: Any, verb: str) -> list[str]:
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


def inspect(path: Path, *, effective: bool, as_json: bool) -> int:
    """Say what an adapter folder holds."""
    from dynlora.report.inspection import inspect_adapter

    facts = inspect_adapter(path, effective=effective)
    if as_json:
        print_json(dataclasses.asdict(facts))
    else:
        console = Console()
        console.print(_facts_view(facts, width=console.width))
    return 0


def report(
    runs: Sequence[Path],
    *,
    output: Path | None,
    picture: Path | None,
    terminal_only: bool,
    as_json: bool,
) -> int:
    """Write the page, and print figures and ranks."""
    from dynlora.report.page import summary_row, write_page
    from dynlora.report.picture import write_picture
    from dynlora.report.run import read_runs
    from dynlora.report.terminal import report_view

    loaded = read_runs(runs)
    written: list[str] = []
    if not terminal_only:
        place = output or (loaded[0].folder if len(loaded) == 1 else Path()) / "report.html"
        written.append(str(write_page(loaded, place, version=version("dynlora"))))
    if picture is not None:
        for run in loaded:
            name = picture if len(loaded) == 1 else picture.with_stem(
                f"{picture.stem}-{run.name.replace('/', '-')}"
            )  # fmt: skip
            written.append(str(write_picture(run, name)))
    if as_json:
        rows = [summary_row(run) | {"ranks": run.ranks} for run in loaded]
        print_json({"runs": rows, "written": written})
        return 0
    console = Console()
    console.print(report_view(loaded, width=console.width))
    for path in written:
        console.print(Text(f"Wrote {path}"))
    return 0


def watch(run: Path, *, every: float, once: bool) -> int:
    """Follow a run until it ends or Ctrl-C."""
    from dynlora.report.run import Run, read_run
    from dynlora.report.terminal import live_view

    if every <= 0:
        raise ValueError(f"--every {every} must be above 0, in seconds.")
    console = Console()

    def look() -> tuple[Run, RenderableType]:
        state = read_run(run)
        return state, live_view(state, width=console.width)

    state, view = look()
    if once:
        console.print(view)
        return 0
    try:
        with Live(view, console=console, auto_refresh=False) as live:
            while not state.is_finished:
                time.sleep(every)
                state, view = look()
                live.update(view, refresh=True)
    except KeyboardInterrupt:
        return 0
    return 0


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def _facts_view(facts: Any, *, width: int) -> RenderableType:
    from dynlora.report.rank_grid import rank_grid

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    total = sum(facts.ranks.values())
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
    for size in facts.sizes:
        table.add_row(
            f"{size.share * 100:.0f} % of energy", f"{size.num_parameters:,} parameters "
            f"({100 * size.num_parameters / max(1, facts.num_parameters):.0f} %), "
            f"{size.components:,} of {total:,} components",
        )  # fmt: skip
    if facts.sizes:
        table.add_row("", "energy is Σσ² over the model, not loss: dynlora shrink measures that")
    shown = facts.effective_ranks or facts.ranks
    largest = max([1, facts.init_r or 0, *facts.ranks.values()])
    of = "at most" if facts.init_r is None else "at the start"
    title = Text("ranks that hold 95 % of the energy", style="dim") if facts.sizes else Text()
    return Group(table, title, rank_grid(shown, init_r=largest, width=width, of=of))


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
