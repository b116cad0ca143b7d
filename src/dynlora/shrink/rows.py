"""Held-out texts from a csv or jsonl file, with labels if they have any."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST_FIELD = 2**31 - 1  # csv's own limit of 131,072 characters is below some documents


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Attributes:
        texts: one for each row.
        labels: one for each row, or None if the file has no column ``label``.
    """

    texts: list[str]
    labels: list[Any] | None


def read_rows(path: Path) -> Rows:
    """Read the column ``text`` and, if there, the column ``label``.

    Args:
        path: a .csv with a line of names, or a .jsonl with one object a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, damaged, empty, or lacks a text or a label somewhere.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"data={str(path)!r} is not a file; name a .csv or .jsonl of texts."
        )
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers:
        raise ValueError(f"data={str(path)!r} must end with .csv or .jsonl.")
    rows = list(readers[path.suffix](path))
    if not rows:
        raise ValueError(f"data={str(path)!r} holds no rows.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("text"), str):
            raise ValueError(
                f"data={str(path)!r} has no text in row {number}; its columns are {sorted(map(str, row))}. "
                "Name the column of the texts 'text'."
            )
    labelled = [row.get("label") is not None for row in rows]
    if any(labelled) and not all(labelled):
        raise ValueError(f"data={str(path)!r} has no label in row {labelled.index(False) + 1}.")
    labels = [row["label"] for row in rows] if all(labelled) else None
    return Rows([row["text"] for row in rows], labels)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data={str(path)!r} is not a csv file in UTF-8: {error}.") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is not an object")
                    yield row
    except ValueError as error:
        raise ValueError(f"data={str(path)!r} is not a jsonl file in UTF-8: {error}.") from error
