"""A run in the terminal: a line a stage, and a bar while it trains."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dynlora_lab.tasks.progress import Listener


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Listener]:
    """A line a stage, and a bar with what is left, the loss and the mean rank."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[live]}"), console=console, transient=True)
    task = bar.add_task("training", visible=False, live="")
    live: dict[str, str] = {}

    def announce(line: str) -> None:
        bar.update(task, visible=False)
        bar.console.print(line, style="dim", highlight=False)

    def on_step(done: int, total: int, rank: float | None) -> None:
        bar.start()  # not before: an empty bar leaves an empty line
        if rank is not None:
            live["rank"] = f"rank {rank:.2f}"
        bar.update(task, completed=done, total=total, visible=True, live=" ".join(live.values()))

    def on_log(step: int, logs: Mapping[str, Any]) -> None:
        if "loss" in logs:
            live["loss"] = f"loss {float(logs['loss']):.3f}"
        measured = {k: v for k, v in logs.items() if k.startswith("eval_")}
        shown = [f"{k.removeprefix('eval_')} {v:.4f}" for k, v in measured.items() if is_shown(k)]
        if shown:
            bar.console.print(f"step {step}: {', '.join(shown)}", style="dim", highlight=False)

    try:
        yield Listener(announce=announce, on_step=on_step, on_log=on_log)
    finally:
        if bar.live.is_started:
            bar.stop()


def is_shown(key: str) -> bool:
    """Whether a person wants to see this number of an evaluation."""
    return not key.endswith(("runtime", "_per_second"))
