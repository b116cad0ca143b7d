"""A run in the terminal: a line a stage, and below a bar; in a log, a line now and then instead."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dynlora_lab.cli.terminal import duration
from dynlora_lab.tasks.progress import Listener

EVERY_S = 30.0  # between two lines on how far a run is, where there is no bar

Show = Callable[[str, int, int, str], None]  # phase, done, in all, the rest in words


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Listener]:
    """A line a stage; how far training and measuring are, the time left, the loss and the mean rank."""
    with (_bar if console.is_terminal else _lines)(console) as show:
        yield _listener(console, show)


def _listener(console: Console, show: Show) -> Listener:
    phase = _Phase()
    live: dict[str, str] = {}

    def on_step(done: int, total: int, rank: float | None) -> None:
        left = phase.left("training", done, total)
        if rank is not None:
            live["rank"] = f"rank {rank:.2f}"
        words = (left, live.get("loss"), live.get("rank"))
        show("training", done, total, ", ".join(filter(None, words)))

    def on_measure(done: int, total: int) -> None:
        show("measuring", done, total, phase.left("measuring", done, total))

    def on_log(step: int, logs: Mapping[str, Any]) -> None:
        if "loss" in logs:
            live["loss"] = f"loss {float(logs['loss']):.3f}"
        measured = {k: v for k, v in logs.items() if k.startswith("eval_")}
        shown = [f"{k.removeprefix('eval_')} {v:.4f}" for k, v in measured.items() if is_shown(k)]
        if shown:
            _print(console, f"step {step}: {', '.join(shown)}")

    return Listener(
        announce=lambda line: _print(console, line),
        on_step=on_step,
        on_log=on_log,
        on_measure=on_measure,
    )


class _Phase:
    """When training, or measuring, began, and hence how long the rest takes at this pace."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[int, float]] = {}

    def left(self, name: str, done: int, total: int) -> str:
        """``about 4:10 left``; "" before the first step ends, when nothing is known."""
        now = time.monotonic()
        begin, began = self._began.get(name, (done, now))
        if done <= begin:  # it begins, perhaps anew
            self._began[name] = (done, now)
            return ""
        return f"about {duration((now - began) / (done - begin) * (total - done))} left"


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    words = TextColumn("{task.fields[words]}")
    bar = Progress(*columns, TimeElapsedColumn(), words, console=console, transient=True)
    task = bar.add_task("", words="")

    def show(phase: str, done: int, total: int, words: str) -> None:
        bar.start()  # not before: an empty bar leaves an empty line
        bar.update(task, description=phase, completed=done, total=total, words=words)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Show]:
    told: dict[str, float] = {}

    def show(phase: str, done: int, total: int, words: str) -> None:
        now = time.monotonic()
        if words and now - told.get(phase, -EVERY_S) >= EVERY_S:
            told[phase] = now
            _print(console, f"{phase} {done}/{total}, {words}")

    yield show


def _print(console: Console, line: str) -> None:
    console.print(line, style="dim", highlight=False, soft_wrap=True)


def is_shown(key: str) -> bool:
    """Whether a person wants to see this number of an evaluation."""
    return not key.endswith(("runtime", "_per_second"))
