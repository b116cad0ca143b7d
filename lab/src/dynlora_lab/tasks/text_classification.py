"""Text classification and regression: one or two text columns and a label; GLUE and any table."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, Value
from scipy import stats
from sklearn import metrics
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits, need_columns, need_filled, need_texts
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.typed_fields import RecipeError

Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]
Score = Callable[[np.ndarray, np.ndarray], float]  # (labels, answers), each (rows,)

SCORES: dict[str, Score] = {
    "accuracy": metrics.accuracy_score,
    "f1": partial(metrics.f1_score, zero_division=0.0),  # of class 1, the GLUE convention
    "macro_f1": partial(metrics.f1_score, average="macro", zero_division=0.0),
    "matthews": lambda labels, answers: _correlation(metrics.matthews_corrcoef, labels, answers),
    "pearson": lambda labels, answers: _correlation(_pearson, labels, answers),
    "spearman": lambda labels, answers: _correlation(_spearman, labels, answers),
}
CORRELATIONS = ("pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``text-classification``.

    Attributes:
        texts: one or two text columns; two are read as a pair.
        label: column with the class (a name or a number) or, for regression, a number.
        is_regression: predict the number itself.
        metrics: the first one chooses the best checkpoint; ``f1`` is that of class 1.
        max_length: tokens of a row (or pair); more are cut off.
    """

    texts: tuple[str, ...] = ("text",)
    label: str = "label"
    is_regression: bool = False
    metrics: tuple[Metric, ...] = ()
    max_length: int = 128

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: there are no texts or too many, or a metric does not fit.
        """
        if len(self.texts) not in (1, 2):
            raise ValueError(f"texts={list(self.texts)} must name one column, or two for pairs.")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1.")
        for metric in self.metrics:
            if (metric in CORRELATIONS) is not self.is_regression:
                raise ValueError(
                    f"metrics holds {metric!r}, which does not fit is_regression={self.is_regression}; "
                    f"{', '.join(CORRELATIONS)} measure numbers, the others classes."
                )

    @property
    def scores(self) -> tuple[str, ...]:
        """Metrics to report; the customary ones if the recipe names none."""
        return self.metrics or (CORRELATIONS if self.is_regression else ("accuracy",))


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the texts and, in the column ``labels``, class numbers or values.

    Raises:
        RecipeError: a column is missing or empty, or labels are missing or differ between splits.
    """
    need_columns(splits, list(options.texts), option="options.texts")
    need_columns(splits, [options.label], option="options.label")
    notes = need_texts(splits, list(options.texts))
    need_filled(splits, [options.label])
    names = None if options.is_regression else _label_names(options, splits)
    train, evals = splits.shaped(partial(_numbered, options=options, names=names))
    return TaskData(
        train=train,
        evals=evals,
        labels=names,
        baselines=_baselines(options, train, evals),
        notes=notes,
    )


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Tokenised rows, and a model with one output per class (one in all for regression)."""
    tokenizer = base.tokenizer()
    names = data.labels
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if names:
        head = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
    model, new = base.model(AutoModelForSequenceClassification, **head)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokens = partial(_tokenised, options=options, tokenizer=tokenizer)
    return Prepared(
        model=model,
        processor=tokenizer,
        head=new,
        train=tokens(data.train),
        evals={name: _longest_first(tokens(rows)) for name, rows in data.evals.items()},
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=partial(measure, options),
    )


def _label_names(options: Options, splits: Splits) -> list[str]:
    """Class names in the order of the outputs; the same in all splits."""
    feature = splits.train.features[options.label]
    if isinstance(feature, ClassLabel):
        for split, rows in splits.each().items():
            other = rows.features[options.label]
            if getattr(other, "names", None) != feature.names:
                raise RecipeError(
                    f"data {splits.where!r}: column {options.label!r} of {split} has other classes "
                    f"than that of train ({feature.names}); give all splits the same."
                )
        return list(feature.names)
    labels = {split: set(rows[options.label][:]) - {None} for split, rows in splits.each().items()}
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        raise RecipeError(
            f"data {splits.where!r}: column {options.label!r} holds fractions; set "
            "options.is_regression, or name the column with the classes."
        )
    known = sorted(labels["train"])
    for split, found in labels.items():
        unseen = sorted(found - labels["train"], key=str)
        if unseen:
            raise RecipeError(
                f"data {splits.where!r}: label {unseen[0]!r} occurs in {split} but not in train; give it "
                "rows in train too, or leave its rows out."
            )
    if len(known) < 2:
        raise RecipeError(
            f"data {splits.where!r}: column {options.label!r} holds {len(known)} class(es) to train on; "
            "give at least 2."
        )
    return [str(name) for name in known]


def _numbered(
    rows: Dataset, *, options: Options, names: list[str] | None, place: Callable[[int], str]
) -> Dataset:
    """The texts, None read as empty, with the column ``labels``."""
    labels = rows[options.label][:]
    number: dict[Any, Any] = {}
    if names is not None:
        is_number = isinstance(rows.features[options.label], ClassLabel)
        number = {i if is_number else name: i for i, name in enumerate(names)}
    numbered = []
    for row, label in enumerate(labels):
        value = label if names is None else number.get(label if label in number else str(label))
        if value is None:
            raise RecipeError(
                f"{place(row)} has the label {label!r}, that is none; name a split that is labelled, or "
                "leave the row out."
            )
        numbered.append(value if names is not None else _as_number(value, row, place))
    columns: dict[str, Any] = {c: [t or "" for t in rows[c][:]] for c in options.texts}
    return Dataset.from_dict({**columns, "labels": numbered})


def _as_number(value: Any, row: int, place: Callable[[int], str]) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise RecipeError(
            f"{place(row)} has the label {value!r}, which is no number; name another column, or leave "
            "out options.is_regression."
        ) from error


def _tokenised(rows: Dataset, *, options: Options, tokenizer: Tokenizer) -> Dataset:
    """Token ids, cut and unpadded, with the column ``labels``."""
    limit = min(tokenizer.model_max_length, options.max_length)
    tokens = tokenizer(*(rows[c][:] for c in options.texts), truncation=True, max_length=limit)
    return Dataset.from_dict({**tokens, "labels": rows["labels"][:]})


def _longest_first(rows: Dataset) -> Dataset:
    """The rows by falling length, so that batches hold little padding; metrics ask for no order."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lambda i: -lengths[i]))


def measure(options: Options, _name: str, prediction: EvalPrediction) -> dict[str, float]:
    """The options' metrics for logits (rows, classes), or (rows, 1) of a regression."""
    logits = prediction.predictions  # (rows, classes), or a tuple with hidden states behind them
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    answers = logits.reshape(-1) if options.is_regression else logits.argmax(axis=-1)
    return scored(options, np.asarray(prediction.label_ids), answers)


def scored(options: Options, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """All metrics of the options for ``labels`` and ``answers``, each (rows,)."""
    return {name: float(SCORES[name](labels, answers)) for name in options.scores}


def _baselines(options: Options, train: Dataset, evals: dict[str, Dataset]) -> dict[str, float]:
    """What one constant answer reaches, averaged over the evaluation sets."""
    known = train["labels"][:]
    answer = float(np.mean(known)) if options.is_regression else Counter(known).most_common(1)[0][0]
    reached = [
        scored(options, np.asarray(rows["labels"][:]), np.full(len(rows), answer))
        for rows in evals.values()
    ]
    return {name: float(np.mean([r[name] for r in reached])) for name in options.scores}


def _correlation(correlation: Score, labels: np.ndarray, answers: np.ndarray) -> float:
    """A correlation; 0 where one side is constant and none is defined."""
    if np.ptp(labels) == 0 or np.ptp(answers) == 0:
        return 0.0
    return correlation(labels, answers)


def _pearson(labels: np.ndarray, answers: np.ndarray) -> float:
    return float(stats.pearsonr(labels, answers).statistic)


def _spearman(labels: np.ndarray, answers: np.ndarray) -> float:
    return float(stats.spearmanr(labels, answers).statistic)


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda options: options.scores[0],
    task_type="SEQ_CLS",
    auto_class=AutoModelForSequenceClassification.__name__,
)
