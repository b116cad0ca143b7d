"""Held-out texts from a csv or jsonl file, with labels if they have any."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST_FIELD = 2**31 - 1  # csv's own limit of 131,072 characters is below some documents


@dataclass(frozen=True)
class Rows:
    """Texts, and their labels if the file has a column ``label``."""

    texts: list[str]
    labels: list[Any] | None


def read_rows(path: Path) -> Rows:
    """The columns ``text`` and ``label`` of a .csv with a line of names, or a .jsonl of objects."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data={str(path)!r} is not a file; name a .csv or .jsonl of texts."
        )
    if path.suffix not in {".csv", ".jsonl"}:
        raise ValueError(f"data={str(path)!r} must end with .csv or .jsonl.")
    try:
        rows = _rows(path)
    except (ValueError, csv.Error) as error:
        kind = path.suffix[1:]
        raise ValueError(f"data={str(path)!r} is not a {kind} file in UTF-8: {error}.") from error
    if not rows:
        raise ValueError(f"data={str(path)!r} holds no rows.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(
                f"data={str(path)!r} has no text in row {number}: {str(row)[:80]}. Name the column of the "
                "texts 'text'."
            )
    labels = [row.get("label") for row in rows]
    if None in labels and any(label is not None for label in labels):
        raise ValueError(f"data={str(path)!r} has no label in row {labels.index(None) + 1}.")
    return Rows([row["text"] for row in rows], None if None in labels else labels)


def _rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        csv.field_size_limit(_LONGEST_FIELD)
        return list(csv.DictReader(file))
