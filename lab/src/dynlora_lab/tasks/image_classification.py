"""Image classification: a picture (array or Pillow) and a class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from sklearn import metrics
from torch import Tensor
from transformers import AutoModelForImageClassification, EvalPrediction

from dynlora_lab.tasks.base_model import BaseModel, outside_the_trunk
from dynlora_lab.tasks.data import Splits, need_columns, need_filled
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.pixels import Pixels, pixels_for
from dynlora_lab.tasks.typed_fields import RecipeError

Metric = Literal["accuracy", "macro_f1"]

SCORES = {
    "accuracy": metrics.accuracy_score,
    "macro_f1": partial(metrics.f1_score, average="macro", zero_division=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``image-classification``.

    Attributes:
        image: column with pictures: arrays of 0..255, or what a hub data set decodes with Pillow.
        label: column with the class, a name or a number.
        metrics: the first one chooses the best checkpoint.
    """

    image: str = "image"
    label: str = "label"
    metrics: tuple[Metric, ...] = ("accuracy",)

    def __post_init__(self) -> None:
        """Check that something is measured.

        Raises:
            ValueError: no metric is named.
        """
        if not self.metrics:
            raise ValueError(f"metrics={list(self.metrics)} must name one of {list(SCORES)}.")


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the columns image and, as numbers, labels.

    Raises:
        RecipeError: a column is missing, or a class occurs only in the evaluation split.
    """
    need_columns(splits, [options.image], option="options.image")
    need_columns(splits, [options.label], option="options.label")
    need_filled(splits, [options.label])
    names = _class_names(options, splits)
    train = _numbered(splits.train, options, names)
    evals = {name: _numbered(rows, options, names) for name, rows in splits.evals.items()}
    return TaskData(
        train=train, evals=evals, labels=names, baselines=_baselines(options, train, evals)
    )


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """A model with one output per class; pictures become inputs batch by batch, in the collator."""
    names = data.labels or []
    model, new = base.model(
        AutoModelForImageClassification,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    pixels = pixels_for(base.name, model.config)
    return Prepared(
        model=model,
        processor=pixels,
        head=new or outside_the_trunk(model),
        train=data.train,
        evals=data.evals,
        collator=partial(_batch, pixels),
        compute_metrics=partial(_measured, options),
    )


def _class_names(options: Options, splits: Splits) -> list[str]:
    feature = splits.train.features[options.label]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = {split: set(rows[options.label][:]) for split, rows in splits.each().items()}
    for split, labels in found.items():
        unseen = sorted(labels - found["train"], key=str)
        if unseen:
            raise RecipeError(
                f"data {splits.where!r}: label {unseen[0]!r} occurs in {split} but not in train; give it "
                "rows in train too, or leave its rows out."
            )
    return [str(label) for label in sorted(found["train"])]


def _numbered(rows: Dataset, options: Options, names: Sequence[str]) -> Dataset:
    is_number = isinstance(rows.features[options.label], ClassLabel)
    number = {name: index for index, name in enumerate(names)}
    labels = [int(v) if is_number else number[str(v)] for v in rows[options.label][:]]
    pictures = rows.select_columns([options.image]).rename_column(options.image, "pixel_values")
    return pictures.add_column("labels", labels)


def _batch(pixels: Pixels, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([pixels(row["pixel_values"]) for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def _measured(options: Options, _name: str, prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions  # (rows, classes), or a tuple with hidden states behind them
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    return _scored(options, np.asarray(prediction.label_ids), logits.argmax(axis=-1))


def _scored(options: Options, labels: Any, answers: Any) -> dict[str, float]:
    return {name: float(SCORES[name](labels, answers)) for name in options.metrics}


def _baselines(options: Options, train: Dataset, evals: Mapping[str, Dataset]) -> dict[str, float]:
    """What the most frequent class reaches, averaged over the evaluation sets."""
    usual, _ = Counter(train["labels"][:]).most_common(1)[0]
    reached = [
        _scored(options, rows["labels"][:], np.full(len(rows), usual)) for rows in evals.values()
    ]
    return {name: float(np.mean([r[name] for r in reached])) for name in options.metrics}


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda options: options.metrics[0],
    auto_class="AutoModelForImageClassification",
    defaults=lambda _options: {"label_names": ["labels"], "remove_unused_columns": False},
)
