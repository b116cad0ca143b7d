"""Who runs which cell: a lock file a cell, held by the worker that is at it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dynlora_lab.bench.results import WORK, result_path


@contextlib.contextmanager
def claimed(folder: Path, key: str) -> Iterator[bool]:
    """Whether the cell ``key`` is ours while the block runs: nobody is at it, and it has no result.

    The system releases the lock when the worker's process ends, however it ends.

    Args:
        folder: of the results, the same for all workers.
        key: of the cell.
    """
    lock = FileLock(folder / WORK / f"{key}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield not result_path(folder, key).is_file()  # it may have ended since we looked
    finally:
        lock.release()


def has_died(folder: Path, key: str) -> bool:
    """Note that a run of the cell ended without a word (killed, out of memory); True the second time."""
    note = _death_note(folder, key)
    was_there = note.is_file()
    note.touch()
    return was_there


def free(folder: Path, key: str) -> None:
    """Take the result of a cell back, so that it runs again."""
    _death_note(folder, key).unlink(missing_ok=True)
    result_path(folder, key).unlink()


def _death_note(folder: Path, key: str) -> Path:
    return folder / WORK / f"{key}.died"
