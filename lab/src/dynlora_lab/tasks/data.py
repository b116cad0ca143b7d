"""Rows for a run: a hub data set, csv/json/parquet files, or an offline carrier; then its splits."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from dynlora_lab.tasks.offline import offline_data
from dynlora_lab.tasks.origin import Origin, marked, separated
from dynlora_lab.tasks.typed_fields import RecipeError

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


HELD_OUT = "held_out"
EVAL = "the evaluation split"  # a single evaluation set, in messages


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """The recipe's section ``data``: which rows train, and which ones measure.

    Attributes:
        name: a hub id, a data file, a folder with files named after their split (train.csv,
            validation.csv), or ``offline:NAME`` for a carrier of ``dynlora assets``.
        config: configuration of a hub data set, such as ``cola`` of GLUE.
        revision: commit of a hub data set.
        train: split to train on.
        evals: split to measure on, or several as name to split (``{matched: validation_matched}``);
            None: the first of validation, dev, test; if there is none, ``eval_share`` of the rows.
        eval_share: share of ``train`` that is held out where the data has no other split, in (0, 1).
        held_out: share of ``train`` that is not trained on but is a further split named ``held_out``,
            which ``evals`` may name: to choose by, where the other splits must only measure.
        max_train_rows, max_eval_rows: only the first so many after a shuffle with ``split_seed``.
        split_seed: decides what is held out and kept, whatever the seed of the run.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    evals: str | dict[str, str] | None = None
    eval_share: float = 0.15
    held_out: float | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of its range.
        """
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} must lie between 0 and 1.")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must lie between 0 and 1.")
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Raw rows.

    Attributes:
        train: rows to train on.
        evals: rows to measure on, by name; a single set under "".
        where: what they are called in messages.
        origins: where the rows were read, by the names of :meth:`each`; {} if that is not known.
    """

    train: Dataset
    evals: Mapping[str, Dataset] = field(default_factory=dict)
    where: str = "data"
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def each(self) -> dict[str, Dataset]:
        """All splits by a name for messages."""
        return {"train": self.train} | {k or EVAL: v for k, v in self.evals.items()}

    def place(self, split: str, row: int) -> str:
        """A row for a message: by its line in the file, or by its number in the split.

        Args:
            split: a name of :meth:`each`.
            row: number of the row in the split, from 0.
        """
        line = self.origins[split].line(row) if split in self.origins else None
        return f"data {self.where!r}: {line or f'row {row} of {split}'}"

    def shaped(self, shape: Callable[..., Dataset]) -> tuple[Dataset, dict[str, Dataset]]:
        """``shape(rows, place=...)`` of train and of each evaluation set; ``place(row)`` as above."""
        train = shape(self.train, place=partial(self.place, "train"))
        evals = {
            name: shape(rows, place=partial(self.place, name or EVAL))
            for name, rows in self.evals.items()
        }
        return train, evals


def read_splits(source: DataSource) -> Splits:
    """Read the rows that ``source`` names, without a model.

    Raises:
        RecipeError: nothing is there, it cannot be read, or a split is missing.
    """
    rows = _read(source)
    if source.train not in rows:
        raise RecipeError(
            f"data {source.name!r} has no split {source.train!r}, found {sorted(rows)}; set data.train."
        )
    if source.held_out is not None:
        both = rows[source.train].train_test_split(source.held_out, seed=source.split_seed)
        rows = DatasetDict({**rows, source.train: both["train"], HELD_OUT: both["test"]})
    train = rows[source.train]
    wanted = _eval_names(source, rows)
    if wanted is None:
        both = train.train_test_split(test_size=source.eval_share, seed=source.split_seed)
        train, evals = both["train"], {"": both["test"]}
    else:
        evals = {name: rows[split] for name, split in wanted.items()}
    train, origin = separated(_first(train, source.max_train_rows, source.split_seed))
    limited = {
        name: separated(_first(split, source.max_eval_rows, source.split_seed))
        for name, split in evals.items()
    }
    splits = Splits(
        train=train,
        evals={name: split for name, (split, _) in limited.items()},
        where=source.name if source.config is None else f"{source.name}/{source.config}",
        origins={"train": origin} | {name or EVAL: found for name, (_, found) in limited.items()},
    )
    for name, split in splits.each().items():
        if not len(split):
            raise RecipeError(f"data {splits.where!r}: {name} holds no rows; name another split.")
    return splits


def need_columns(splits: Splits, columns: list[str], *, option: str) -> None:
    """Refuse data that lacks one of ``columns`` in any split.

    Args:
        splits: the rows.
        columns: names that must be there.
        option: the recipe's field that chose them, for the message.

    Raises:
        RecipeError: names the column, the split and what is there.
    """
    for split, rows in splits.each().items():
        for column in columns:
            if column not in rows.column_names:
                raise RecipeError(
                    f"data {splits.where!r}: column {column!r} is missing in {split}, found "
                    f"{rows.column_names}; set {option}."
                )


def need_texts(splits: Splits, columns: list[str]) -> list[str]:
    """Refuse a text column that holds no text at all in some split, or something else than text.

    Returns:
        A line for each column and split in which some texts are blank, for the user.

    Raises:
        RecipeError: names the column and the split.
    """
    notes = []
    for split, rows in splits.each().items():
        for column in columns:
            cells = rows[column][:]
            odd = next((c for c in cells if c is not None and not isinstance(c, str)), None)
            if odd is not None:
                raise RecipeError(
                    f"data {splits.where!r}: column {column!r} of {split} holds "
                    f"{type(odd).__name__} values such as {odd!r}, not texts; name a text column."
                )
            blank = [row for row, cell in enumerate(cells) if _is_blank(cell)]
            if len(blank) == len(cells):
                raise RecipeError(
                    f"data {splits.where!r}: every text in column {column!r} of {split} is empty; name "
                    "the column that holds the texts."
                )
            if blank:
                notes.append(
                    f"{len(blank)} of {len(cells)} texts in column {column!r} of {split} are blank and "
                    f"are used as they are (the first: {splits.place(split, blank[0])})"
                )
    return notes


def need_filled(splits: Splits, columns: list[str]) -> None:
    """Refuse a row with a blank cell in one of ``columns``, which cannot be used.

    Raises:
        RecipeError: names the column and the first such row.
    """
    for split, rows in splits.each().items():
        for column in columns:
            for row, cell in enumerate(rows[column][:]):
                if _is_blank(cell):
                    raise RecipeError(
                        f"{splits.place(split, row)} has nothing in column {column!r}; fill it in, or "
                        "leave the row out."
                    )


def _is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _read(source: DataSource) -> DatasetDict:
    kind, _, name = source.name.partition(":")
    if kind == "offline":
        return _marked(offline_data(name))
    path = Path(source.name)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file() or path.suffix in BUILDERS or path.suffix == ".gz":
        return _read_files({"train": path})
    return _marked(_read_hub(source))


def _marked(rows: DatasetDict) -> DatasetDict:
    return DatasetDict({split: marked(part) for split, part in rows.items()})


def _read_folder(folder: Path) -> DatasetDict:
    files = [f for f in sorted(folder.iterdir()) if _suffix(f) in BUILDERS]
    if not files:
        raise RecipeError(
            f"data {str(folder)!r} holds no file that ends in {', '.join(BUILDERS)}; put train.csv "
            "and validation.csv there, say."
        )
    splits = {f.name.partition(".")[0]: f for f in files}
    if len(splits) < len(files):
        raise RecipeError(
            f"data {str(folder)!r} holds two files for one split: {[f.name for f in files]}; keep one."
        )
    return _read_files(splits)


def _read_files(files: Mapping[str, Path]) -> DatasetDict:
    read = {}
    for split, path in files.items():
        if not path.is_file():
            raise RecipeError(f"data {str(path)!r} is not a file; check data.name.")
        options = {"sep": "\t"} if _suffix(path) == ".tsv" else {}
        try:
            found = load_dataset(
                BUILDERS[_suffix(path)], data_files={split: str(path)}, split=split, **options
            )
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            cause = str(error.__cause__ or error).rstrip(".!")
            raise RecipeError(
                f"data {str(path)!r} cannot be read: {cause}. Check its format and that it has rows."
            ) from error
        read[split] = marked(found, path)
    if len(read) == 1:
        return _by_split_column(next(iter(read.values())))
    return DatasetDict(read)


def _by_split_column(rows: Dataset) -> DatasetDict:
    """One file is the split ``train``, unless it has a column ``split``."""
    if "split" not in rows.column_names:
        return DatasetDict(train=rows)
    names = rows["split"][:]
    return DatasetDict(
        {
            str(split): rows.select([i for i, n in enumerate(names) if n == split])
            for split in dict.fromkeys(names)
        }
    )


def _read_hub(source: DataSource) -> DatasetDict:
    try:
        return load_dataset(source.name, source.config, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise RecipeError(
            f"data {source.name!r} is neither a file, a folder, nor a data set that the hub gives"
            f"{offline}: {error}"
        ) from error


def _eval_names(source: DataSource, rows: DatasetDict) -> dict[str, str] | None:
    wanted = {"": source.evals} if isinstance(source.evals, str) else source.evals
    if wanted is None:
        found = next((s for s in ("validation", "dev", "test") if s in rows), None)
        return None if found is None else {"": found}
    for split in wanted.values():
        if split not in rows:
            raise RecipeError(
                f"data {source.name!r} has no split {split!r}, found {sorted(rows)}; set data.evals."
            )
    return wanted


def _first(rows: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(count))


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
