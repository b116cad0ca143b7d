"""Where a row stood before splits were made and shuffled, for messages that name it."""

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

FILE, ROW = "__file__", "__row__"  # columns beside the rows until their splits are made
LINES = (".jsonl", ".txt")  # one row a line


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of a split come from.

    Attributes:
        rows: for each row its number in the file, or in the data set's split, from 0.
        files: for each row its file; "" for a data set without files of ours.
    """

    rows: Sequence[int]
    files: Sequence[str]

    def line(self, row: int) -> str | None:
        """``line 10 of rows.csv`` for a row of the split; None where there is no file.

        A format without lines, such as parquet, counts its rows from 1.
        """
        file, number = self.files[row], self.rows[row]
        if not file:
            return None
        path = Path(file)
        line = _line(path, number)
        return f"line {line} of {path.name}" if line else f"row {number + 1} of {path.name}"


def marked(rows: Dataset, file: Path | None = None) -> Dataset:
    """The rows with the columns FILE and ROW, for :func:`separated`."""
    files = [str(file) if file else ""] * len(rows)
    return rows.add_column(FILE, files).add_column(ROW, list(range(len(rows))))


def separated(rows: Dataset) -> tuple[Dataset, Origin]:
    """The rows without FILE and ROW, and what these said."""
    origin = Origin(rows=rows[ROW][:], files=rows[FILE][:])
    return rows.remove_columns([FILE, ROW]), origin


def _line(path: Path, row: int) -> int | None:
    """Line of the file, from 1, on which a row begins; None where rows are not lines.

    Blank lines hold no row, and a cell in quotes may go over several lines.
    """
    packed = path.suffix == ".gz"
    suffix = Path(path.stem).suffix if packed else path.suffix
    if suffix not in (".csv", ".tsv", *LINES):
        return None
    opened = gzip.open if packed else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        if suffix == ".txt":
            return row + 1
        if suffix == ".jsonl":
            filled = (number for number, line in enumerate(file, start=1) if line.strip())
            return next((n for count, n in enumerate(filled) if count == row), None)
        reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        began = 1
        record = -1  # the first one names the columns
        for cells in reader:
            if cells and record == row:
                return began
            record += bool(cells)
            began = reader.line_num + 1
    return None
