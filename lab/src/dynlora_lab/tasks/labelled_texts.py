"""Labelled texts from a CSV file for the demo: each row checked, and some held out."""

import csv
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

TEST_SHARE = 0.15  # of the distinct texts of each label, where a file has no column split
SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled text; ``split`` is "train", "test" or "" where the file does not say."""

    text: str
    label: str
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Training and held-out examples; every held-out label occurs in training too."""

    labels: tuple[str, ...]  # sorted; the position is the class number
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def shipped_sample() -> LabelledTexts:
    """9,000 noun definitions of WordNet 3.0 in 26 classes such as ``noun.animal``."""
    return read_labelled_texts(Path(str(files("dynlora_lab.data") / "wordnet_glosses.csv.gz")))


def read_labelled_texts(path: Path) -> LabelledTexts:
    """Read a UTF-8 CSV file (``.gz``: unpacked) with the columns text, label and, if wished, split.

    Without the column split, 15 % of each label are held out; a hash of the text decides which, so
    neither the order of the rows nor a seed matters and equal texts stay together.

    Raises:
        ValueError: the file is missing, unreadable or unfit; says where and what to do.
    """
    examples = _examples(path)
    if examples and not examples[0].split:
        examples = hold_out(examples)
    train, test = (tuple(e for e in examples if e.split == split) for split in SPLITS)
    labels = sorted({e.label for e in train})
    unseen = sorted({e.label for e in test} - set(labels))
    if unseen:
        raise ValueError(
            f"{path}: label {unseen[0]!r} occurs only in the split 'test'; give it rows in 'train' "
            "too, or leave out the column split."
        )
    if len(labels) < 2:
        raise ValueError(
            f"{path}: column 'label' holds {len(labels)} class(es) to train on; give at least 2."
        )
    if not test:
        raise ValueError(
            f"{path}: no rows are held out for testing; mark some as 'test' in the column split, "
            "or give at least one label two different texts."
        )
    return LabelledTexts(labels=tuple(labels), train=train, test=test)


def hold_out(examples: Sequence[Example]) -> list[Example]:
    """The examples with a split each: per label, 15 % of the distinct texts go to "test".

    A label with a single text is for training only; from two texts on, at least one is held out.
    """
    texts_of: dict[str, set[str]] = {}
    for example in examples:
        texts_of.setdefault(example.label, set()).add(example.text)
    held_out: set[tuple[str, str]] = set()
    for label, texts in texts_of.items():
        count = max(round(TEST_SHARE * len(texts)), 1) if len(texts) > 1 else 0
        by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
        held_out.update((label, text) for text in by_hash[:count])
    return [
        Example(text=e.text, label=e.label, split=SPLITS[(e.label, e.text) in held_out])
        for e in examples
    ]


def _examples(path: Path) -> list[Example]:
    """The rows of the file, each checked; all or none have a split."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a CSV file with the columns text and label.")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or ())
            return [_example(row, where=f"{path}, line {reader.line_num}") for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except (csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}.") from error


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for needed in ("text", "label"):
        if needed not in columns:
            raise ValueError(
                f"{path}: column {needed!r} is missing, found {list(columns)}; the first line must "
                "name the columns text and label, separated by commas."
            )


def _example(row: Mapping[Any, Any], *, where: str) -> Example:
    if None in row:
        raise ValueError(
            f"{where} has more cells than the first line; put texts with commas into double quotes."
        )
    cells = {column: (cell or "").strip() for column, cell in row.items()}
    for column in ("text", "label"):
        if not cells[column]:
            raise ValueError(f"{where}: column {column!r} is empty; fill it or delete the row.")
    if cells.get("split", "train") not in SPLITS:
        raise ValueError(
            f"{where}: column 'split' is {cells['split']!r}; write 'train' or 'test', or leave out "
            "the column."
        )
    return Example(text=cells["text"], label=cells["label"], split=cells.get("split", ""))
