"""``dynlora bench``: run a suite on some workers, watch it, and write its tables."""

import signal
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import (
    FAILED as EXIT_FAILED,
)
from dynlora.cli.terminal import (
    INTERRUPTED,
    USER_MISTAKE,
    print_error,
    report_error,
)
from dynlora_lab.bench.claims import free
from dynlora_lab.bench.plan import chosen_rate, num_cells, num_ended
from dynlora_lab.bench.quick import quick_suite
from dynlora_lab.bench.render import render
from dynlora_lab.bench.results import (
    DONE,
    FAILED,
    Result,
    open_folder,
    read_results,
)
from dynlora_lab.bench.suite import Cell, Suite, check_parts, read_suite
from dynlora_lab.bench.worker import Bench, Listener, log_of, run_workers, slots
from dynlora_lab.cli.terminal import duration, quiet_run
from dynlora_lab.tasks.typed_fields import RecipeError

REFRESH_S = 1.0
INDENT = "    "
ERROR_LINES = 3  # of an error, in a terminal; the log has the rest


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line says; see ``dynlora bench --help``."""

    suite: Path | None
    quick: bool
    results: Path | None
    workers: int
    devices: list[str]
    threads: int | None
    cells: list[str]
    render_only: bool
    retry_failed: bool
    debug: bool


@dataclass
class Watch:
    """What the live table shows; workers' threads write, the display reads.

    Attributes:
        running: cell key to (slot, when it began).
        seconds: of the cells that ended here.
    """

    running: dict[str, tuple[str, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def start(self, cell: Cell, slot: str) -> None:
        """A cell begins."""
        self.running[cell.key] = (slot, time.monotonic())

    def end(self, cell: Cell, result: Result | None, seconds: float) -> None:
        """A cell has ended."""
        self.running.pop(cell.key, None)
        if result is not None:
            self.seconds.append(seconds)


def bench(wishes: Wishes) -> int:
    """Run, print, write and return the exit code: 0 done, 1 cells failed, 2 a mistake, 130 Ctrl-C."""
    try:
        with quiet_run():
            suite, folder = _suite_and_folder(wishes)
            if wishes.render_only:
                return _show_tables(folder)
            open_folder(folder, suite)
            shared = _shared(wishes, suite, folder)
            if wishes.retry_failed:
                _free_failed(shared.folder)
            due = shared.due(read_results(shared.folder))
            check_parts(suite, dict.fromkeys(cell.task for cell in due))
            _run(shared, wishes)
            if shared.stop.is_set():
                print_error(f"stopped; go on with: {shared.command}")
                return INTERRUPTED
            _show_tables(folder)
            results = read_results(folder)
            _check_asked(wishes.cells, results)
    except (RecipeError, OSError) as error:
        return report_error(error, code=USER_MISTAKE, debug=wishes.debug)
    except RuntimeError as error:
        return report_error(error, code=EXIT_FAILED, debug=wishes.debug)
    failed = [k for k, r in results.items() if r["status"] == FAILED]
    if failed:
        print_error(
            f"{_cells(len(failed))} failed; run again with: {shared.command} --retry-failed"
        )
    return EXIT_FAILED if failed else 0


def progress_view(
    suite: Suite, results: Mapping[str, Result], watch: Watch, places: int
) -> RenderableType:
    """The live table: cells and the chosen learning rate by task and method, then what runs, then ETA."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for task in suite.tasks:
        table.add_column(task, justify="right")
    for method in suite.methods:
        table.add_row(method, *(_standing(suite, results, task, method) for task in suite.tasks))
    planned, ended = num_cells(suite, results), num_ended(suite, results)
    line = f"{ended} of {planned} cells"
    left = _left_s(results, watch, planned - ended, places)
    if left is not None:
        line += f", about {duration(left)} left"
    now = time.monotonic()
    running = [
        Text(f"{slot}: {key} ({duration(now - began)})", style="dim")
        for key, (slot, began) in sorted(watch.running.items())
    ]
    return Group(table, Text(line), *running)


def _suite_and_folder(wishes: Wishes) -> tuple[Suite, Path]:
    if (wishes.suite is None) is not wishes.quick:
        raise RecipeError("name a SUITE.yaml, or give --quick, and not both.")
    if wishes.quick:
        folder = wishes.results or Path("dynlora-bench-quick")
        return quick_suite(folder.resolve() / "parts"), folder
    suite = read_suite(wishes.suite)  # type: ignore[arg-type]  # one of the two is there
    return suite, wishes.results or Path("lab") / "results" / suite.name


def _shared(wishes: Wishes, suite: Suite, folder: Path) -> Bench:
    command = f"dynlora bench {'--quick' if wishes.quick else wishes.suite}"
    if wishes.results:
        command += f" --results {wishes.results}"
    return Bench(
        suite=suite,
        folder=folder.resolve(),
        command=command,
        only=frozenset(wishes.cells) or None,
        stop=threading.Event(),
    )


def _check_asked(keys: list[str], results: Mapping[str, Result]) -> None:
    """RecipeError if a cell that was asked for by name has no result, since none of these names is due."""
    if missing := [key for key in keys if key not in results]:
        raise RecipeError(
            f"--cell {missing[0]} names no cell that is due, so nothing ran for it. A name is "
            "TASK--METHOD--lrRATE--seedSEED. Seeds of the suite run at the learning rate that its sweep "
            "chose, once the sweep has ended: the names of all cells are in the folder cells/ as they end."
        )


def _free_failed(folder: Path) -> None:
    """Let cells that failed run again."""
    for key, result in read_results(folder).items():
        if result["status"] == FAILED:
            free(folder, key)


def _run(shared: Bench, wishes: Wishes) -> None:
    """Run the workers under a display; Ctrl-C sets ``shared.stop``."""
    places = slots(devices=wishes.devices, workers=wishes.workers, threads=wishes.threads)
    console, watch = Console(stderr=True), Watch()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        shared.stop.set()

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        if console.is_terminal:
            _run_live(shared, places, console, watch)
        else:
            on_end = _told(shared, watch, len(places), console)
            run_workers(shared, places, Listener(on_start=watch.start, on_end=on_end))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_live(shared: Bench, places: Sequence[Any], console: Console, watch: Watch) -> None:
    def view() -> RenderableType:
        return progress_view(shared.suite, read_results(shared.folder), watch, len(places))

    def on_end(cell: Cell, result: Result | None, seconds: float) -> None:
        watch.end(cell, result, seconds)
        if result is not None and result["status"] == FAILED:  # the table only counts it
            reason = reason_text(result, log_of(shared.folder, cell.key), width=console.width)
            _print(console, f"{cell.key}: failed after {duration(seconds)}\n{reason}")

    listener = Listener(on_start=watch.start, on_end=on_end)
    with Live(
        get_renderable=view, console=console, refresh_per_second=1 / REFRESH_S, transient=True
    ):
        run_workers(shared, list(places), listener)


def reason_text(result: Result, log: Path, *, width: int) -> str:
    """Why a cell failed, in few indented lines: the beginning of its error, and the file with the rest."""
    lines = textwrap.wrap(
        str(result["error"]),
        width=width,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
        max_lines=ERROR_LINES,
        placeholder=" …",
    )
    if log.is_file():  # not of a cell that ran on another machine
        lines.append(f"{INDENT}log: {log}")
    return "\n".join(lines)


def _told(shared: Bench, watch: Watch, places: int, console: Console) -> Callable[..., None]:
    """For logs: a line per cell that has ended, and below one that failed the reason."""

    def on_end(cell: Cell, result: Result | None, seconds: float) -> None:
        watch.end(cell, result, seconds)
        if result is None:
            return
        results = read_results(shared.folder)
        planned, ended = num_cells(shared.suite, results), num_ended(shared.suite, results)
        left = duration(_left_s(results, watch, planned - ended, places) or 0)
        if result["status"] == DONE:
            outcome = f"{shared.suite.select} {result['selected']['final']:.4f},"
        else:
            outcome = "failed after"
        line = f"{ended}/{planned} {cell.key}: {outcome} {duration(seconds)}, about {left} left"
        if result["status"] == FAILED:
            reason = reason_text(result, log_of(shared.folder, cell.key), width=console.width)
            line = f"{line}\n{reason}"
        _print(console, line)

    return on_end


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"


def _standing(suite: Suite, results: Mapping[str, Result], task: str, method: str) -> str:
    mine = [
        r for r in results.values() if (r["cell"]["task"], r["cell"]["method"]) == (task, method)
    ]
    if not mine:
        return ""
    scale = float(suite.tasks[task].get("scale", suite.scale))
    rate = chosen_rate(suite, results, task, method)
    at = [r for r in mine if r["status"] == DONE and r["cell"]["learning_rate"] == rate]
    failed = sum(r["status"] == FAILED for r in mine)
    text = _cells(len(mine))
    if at:
        mean = scale * sum(r["selected"]["final"] for r in at) / len(at)
        text = f"{mean:.1f} at {rate:g}, {text}"
    return text + (f", {failed} failed" if failed else "")


def _left_s(results: Mapping[str, Result], watch: Watch, cells: int, places: int) -> float | None:
    """Seconds that the cells still due take, by the mean of those that ended; None without one."""
    known = watch.seconds or [r["wall_s"] for r in results.values() if "wall_s" in r]
    return sum(known) / len(known) * cells / places if known else None


def _show_tables(folder: Path) -> int:
    paths = render(folder)
    Console().print(f"Tables: {', '.join(str(p) for p in paths)}", highlight=False, soft_wrap=True)
    return 0
