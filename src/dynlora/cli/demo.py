"""``dynlora demo``: run the classification task and print what came out."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import FAILED, USER_MISTAKE, print_error, quiet_libraries, report_error
from dynlora.report.rank_grid import rank_grid
from dynlora.tasks.assets import AssetError
from dynlora.tasks.classification_run import run_classification
from dynlora.tasks.reload_check import LOGITS_TOLERANCE, ReloadError
from dynlora.tasks.run_record import RunResult, RunSettings

QUICK_STEPS = 60


def run_demo(*, debug: bool, quick: bool, **options: Any) -> int:
    """Run, print and return the exit code; ``options`` are those of RunSettings.

    An error is one line on stderr, with ``debug`` a traceback.
    """
    console = Console()
    try:
        settings = RunSettings(**_with_length(options, quick=quick))
        with quiet_libraries(), _progress(console) as (announce, on_step):
            result = run_classification(settings, announce=announce, on_step=on_step)
    except (ValueError, OSError) as error:
        return report_error(error, code=USER_MISTAKE, debug=debug)
    except (AssetError, ReloadError, FloatingPointError) as error:
        return report_error(error, code=FAILED, debug=debug)
    console.print(result_view(result, width=console.width))
    for failure in result.failed_checks():
        print_error(f"check failed: {failure}")
    return FAILED if result.failed_checks() else 0


def result_view(result: RunResult, *, width: int) -> RenderableType:
    """All figures of a run, as wide as the terminal at most."""
    return Group(
        _heading("Accuracy on held-out texts"),
        _accuracies(result),
        _heading("Final ranks"),
        rank_grid(result.ranks, init_r=result.init_r, width=width),
        _heading("Adapter"),
        _sizes(result),
        Text(),
        Text(f"Saved: {result.adapter_file}, {result.adapter_bytes:,} bytes with the head"),
        Text(
            "Re-loaded in stock PEFT, without dynlora: max |Δ logits| "
            f"{result.reload_difference:.2g} (limit {LOGITS_TOLERANCE:.0e})"
        ),
        Text(f"Training: {result.optimizer_steps} steps in {result.train_s:.0f} s"),
    )


def _with_length(options: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """The options with ``--quick``, or its absence, spelled out."""
    if quick and (options["epochs"] is not None or options["max_steps"] is not None):
        raise ValueError(
            f"--quick means --max-steps {QUICK_STEPS}; leave out --epochs and --max-steps, or --quick."
        )
    if quick:
        return {**options, "max_steps": QUICK_STEPS}
    if options["epochs"] is None and options["max_steps"] is None:
        return {**options, "epochs": 1}
    return options


def _heading(text: str) -> RenderableType:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))


def _accuracies(result: RunResult) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("always the most frequent class", f"{result.majority_accuracy:.1%}")
    table.add_row("before training (head drawn at random)", f"{result.accuracy_before:.1%}")
    table.add_row("after training", Text(f"{result.accuracy_after:.1%}", style="bold"))
    return table


def _sizes(result: RunResult) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("")
    for name in ("start", "end", "mean rank"):
        table.add_column(name, justify="right")
    mean = result.components_end / len(result.ranks)
    start, end = result.components_start, result.components_end
    table.add_row("components", f"{start:,}", f"{end:,}", f"{result.init_r} -> {mean:.3g}")
    table.add_row("parameters", f"{result.parameters_start:,}", f"{result.parameters_end:,}")
    return table


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[tuple[Any, Any]]:
    """Callbacks of a run: a line a stage, and a bar that is gone when training is over."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("training", visible=False)

    def announce(line: str) -> None:
        bar.update(task, visible=False)
        bar.console.print(line, style="dim", highlight=False)

    def on_step(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, visible=True)

    with bar:
        yield announce, on_step
