"""What the lab's commands share: quiet libraries during a run, and how long something takes, in words."""

import contextlib
import warnings
from collections.abc import Iterator

import datasets

from dynlora.cli.terminal import quiet_libraries


@contextlib.contextmanager
def quiet_run() -> Iterator[None]:
    """No load reports, progress bars and hints of other libraries between our lines."""
    had_bars = not datasets.are_progress_bars_disabled()
    if had_bars:
        datasets.disable_progress_bars()
    try:
        with quiet_libraries():
            # PEFT takes a module that its AdaLoRA cut to rank 0 for a shard that was not gathered
            warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
            yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03`` or ``3 s``.

    >>> [duration(s) for s in (2.6, 123, 3723)]
    ['3 s', '2:03', '1:02:03']
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
