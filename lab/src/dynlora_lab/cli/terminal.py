"""Quiet libraries during a run: the library's own, and those that only the lab uses."""

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
