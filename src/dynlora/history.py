"""history.jsonl: what happened in a run, one JSON object a line, for reports and for whoever watches.

Every line has ``event`` (start, prune, log, end), ``step`` (optimizer steps done) and ``time`` (seconds
since 1970). It is written whole or not at all, so a killed run leaves a readable file.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora.files import whole_file

HISTORY_FILE = "history.jsonl"

Event = dict[str, Any]


def read_history(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a history file, oldest first.

    Args:
        path: the file, or the folder of a run that holds one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is not a JSON object with an event and a step.
    """
    file = Path(path)
    file = file / HISTORY_FILE if file.is_dir() else file
    lines = file.read_text(encoding="utf-8").splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is not None:
            events.append(event)
        elif number < len(lines):  # the last line may be one that another program is writing
            raise ValueError(
                f"{file}, line {number} is not a JSON object with 'event' and 'step': the file was "
                "changed by something else than a run. Remove the line, or give another run."
            )
    return events


def _event(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    known = isinstance(event, dict) and isinstance(event.get("step"), int) and "event" in event
    return event if known else None


class HistoryFile:
    """Appends events to a history file.

    Args:
        folder: the run's folder; it is made if need be.
        resume_step: None begins a new file in place of any old one; a number keeps the events up to
            and including that step, without an end, because the run goes on from there.

    Attributes:
        events: what was kept of an earlier part of the run.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(folder) / HISTORY_FILE
        self.events: list[Event] = []
        if resume_step is not None and self.path.exists():
            self.events = [
                event
                for event in read_history(self.path)
                if event["step"] <= resume_step and event["event"] != "end"
            ]
        with whole_file(self.path) as temporary:
            temporary.write_bytes(b"".join(map(_line, self.events)))

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one line in one piece; where that fails, as on a full disk, none of it is kept."""
        line = _line(event)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(file).st_size
            if os.write(file, line) < len(line):
                os.ftruncate(file, before)
                raise OSError(f"{self.path} takes no further line: the disk is full.")
        finally:
            os.close(file)


def _line(event: Mapping[str, Any]) -> bytes:
    text = json.dumps(_plain(event), separators=(",", ":"), allow_nan=False)
    return f"{text}\n".encode()


def _plain(value: Any) -> Any:
    """What JSON can say: NaN and infinity, which it cannot, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)  # of numpy or torch, too
    return number if math.isfinite(number) else None
