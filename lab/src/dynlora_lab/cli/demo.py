"""``dynlora demo``: run the classification task and print what came out."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import FAILED, USER_MISTAKE, print_error, report_error
from dynlora.report.terminal import rank_grid
from dynlora_lab.cli.progress import progress
from dynlora_lab.cli.terminal import quiet_run
from dynlora_lab.tasks.assets import AssetError
from dynlora_lab.tasks.demo_run import DemoResult, demo_recipe, run_demo
from dynlora_lab.tasks.reload_check import LOGITS_TOLERANCE, ReloadError

QUICK_STEPS = 60


def demo(*, debug: bool, quick: bool, **options: Any) -> int:
    """Run, print and return the exit code; ``options`` are those of ``demo_recipe``.

    An error is one line on stderr, with ``debug`` a traceback.
    """
    console = Console()
    try:
        recipe = demo_recipe(**_with_length(options, quick=quick))
        with quiet_run(), progress(console) as listener:
            result = run_demo(recipe, data=options["data"], listener=listener)
    except (ValueError, OSError) as error:
        return report_error(error, code=USER_MISTAKE, debug=debug)
    except (AssetError, ReloadError, FloatingPointError) as error:
        return report_error(error, code=FAILED, debug=debug)
    console.print(result_view(result, width=console.width))
    for failure in result.failed_checks():
        print_error(f"check failed: {failure}")
    return FAILED if result.failed_checks() else 0


def result_view(result: DemoResult, *, width: int) -> RenderableType:
    """All figures of a run, as wide as the terminal at most."""
    record = result.record
    init_r = record["recipe"]["adapter"]["init_r"]
    return Group(
        _heading("Accuracy on held-out texts"),
        _accuracies(result),
        _heading("Final ranks"),
        rank_grid(record["ranks"], init_r=init_r, width=width),
        _heading("Adapter"),
        _sizes(record["budget"], init_r=init_r),
        Text(),
        Text(f"Saved: {result.adapter_file}, {result.adapter_bytes:,} bytes with the head"),
        Text(
            "Re-loaded in stock PEFT, without dynlora: max |Δ logits| "
            f"{result.reload.difference:.2g} (limit {LOGITS_TOLERANCE:.0e})"
        ),
        Text(f"Training: {record['steps']} steps in {record['train_s']:.0f} s"),
        Text(f"Look closer: dynlora report {result.adapter_file.parent}"),
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


def _accuracies(result: DemoResult) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("always the most frequent class", f"{result.majority_accuracy:.1%}")
    table.add_row("before training (head drawn at random)", f"{result.accuracy_before:.1%}")
    table.add_row("after training", Text(f"{result.accuracy_after:.1%}", style="bold"))
    return table


def _sizes(budget: Mapping[str, int], *, init_r: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("")
    for name in ("start", "end", "mean rank"):
        table.add_column(name, justify="right")
    mean = budget["components_end"] / budget["modules"]
    start, end = budget["components_start"], budget["components_end"]
    table.add_row("components", f"{start:,}", f"{end:,}", f"{init_r} -> {mean:.3g}")
    table.add_row("parameters", f"{budget['parameters_start']:,}", f"{budget['parameters_end']:,}")
    return table
