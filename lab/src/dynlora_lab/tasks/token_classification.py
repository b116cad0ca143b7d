"""Token classification: sentences in words, one tag a word; names, chunks, parts of speech."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.base_model import BaseModel, outside_the_trunk
from dynlora_lab.tasks.data import Splits, need_columns
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.scoring.entity_spans import span_scores
from dynlora_lab.tasks.scoring.perplexity import IGNORED
from dynlora_lab.tasks.typed_fields import RecipeError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``token-classification``.

    Attributes:
        words: column with a list of words.
        tags: column with one tag for each word, names or class numbers. Tags like ``B-person`` and
            ``I-person`` mark spans; the F1 of spans chooses the best checkpoint.
        max_length: pieces of words in a sentence; what lies behind is cut off and counts as "O".
    """

    words: str = "tokens"
    tags: str = "ner_tags"
    max_length: int = 128

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: no piece would be left.
        """
        if self.max_length < 3:
            raise ValueError(f"max_length={self.max_length} must be at least 3: two are special.")


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the columns words and, as numbers, tags.

    Raises:
        RecipeError: a column is missing, words and tags differ in number, or a tag occurs only in
            the evaluation split.
    """
    need_columns(splits, [options.words], option="options.words")
    need_columns(splits, [options.tags], option="options.tags")
    names = _tag_names(options, splits)
    train, evals = splits.shaped(partial(_numbered, options=options, names=names))
    return TaskData(
        train=train, evals=evals, labels=names, baselines=_baselines(train, evals, names)
    )


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Pieces of words, of which the first of each word carries its tag."""
    names = data.labels or []
    tokenizer = base.tokenizer(add_prefix_space=True)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"model {base.name!r} has no fast tokenizer, which tells the pieces of a word; name a model "
            "with a tokenizer.json."
        )
    model, new = base.model(
        AutoModelForTokenClassification,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    pieces = partial(_pieces, options=options, tokenizer=tokenizer)
    evals = {name: pieces(rows) for name, rows in data.evals.items()}
    cut = {name: _cut_off(rows, data.evals[name], names) for name, rows in evals.items()}
    return Prepared(
        model=model,
        processor=tokenizer,
        head=new or outside_the_trunk(model),
        train=pieces(data.train),
        evals=evals,
        collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=partial(_measured, names, cut),
        trainer_options={"preprocess_logits_for_metrics": _answers},
    )


def _tag_names(options: Options, splits: Splits) -> list[str]:
    """Tags in the order of the outputs, "O" first where they are plain texts."""
    feature = splits.train.features[options.tags]
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    found = {
        split: {str(tag) for tags in rows[options.tags][:] for tag in tags}
        for split, rows in splits.each().items()
    }
    for split, tags in found.items():
        unseen = sorted(tags - found["train"])
        if unseen:
            raise RecipeError(
                f"data {splits.where!r}: tag {unseen[0]!r} occurs in {split} but not in train; give it "
                "rows in train too, or leave its rows out."
            )
    return sorted(found["train"], key=lambda tag: (tag != "O", tag))


def _numbered(
    rows: Dataset, *, options: Options, names: list[str], place: Callable[[int], str]
) -> Dataset:
    words, tags = rows[options.words][:], rows[options.tags][:]
    is_number = isinstance(getattr(rows.features[options.tags], "feature", None), ClassLabel)
    number = {name: index for index, name in enumerate(names)}
    for row, (sentence, marks) in enumerate(zip(words, tags, strict=True)):
        if not isinstance(sentence, list) or len(sentence) != len(marks):
            raise RecipeError(
                f"{place(row)} has {len(marks)} tags in {options.tags!r} for what stands in "
                f"{options.words!r}; give a list of words and one tag for each."
            )
    numbers = [[t if is_number else number[str(t)] for t in marks] for marks in tags]
    return Dataset.from_dict({"words": words, "tags": numbers})


def _pieces(rows: Dataset, *, options: Options, tokenizer: Tokenizer) -> Dataset:
    limit = min(tokenizer.model_max_length, options.max_length)
    encoded = tokenizer(
        rows["words"][:], is_split_into_words=True, truncation=True, max_length=limit
    )
    labels = []
    for row, tags in enumerate(rows["tags"][:]):
        previous, marks = None, []
        for word in encoded.word_ids(row):
            is_first = word is not None and word != previous
            marks.append(tags[word] if is_first else IGNORED)
            previous = word
        labels.append(marks)
    return Dataset.from_dict({**encoded, "labels": labels})


def _cut_off(pieces: Dataset, rows: Dataset, names: list[str]) -> list[list[str]]:
    """Tags of the words for which no piece was left (or which have none), by sentence."""
    kept = [sum(label != IGNORED for label in labels) for labels in pieces["labels"][:]]
    rest = (tags[count:] for tags, count in zip(rows["tags"][:], kept, strict=True))
    return [[names[tag] for tag in tags] for tags in rest if tags]


def _answers(logits: Any, _labels: Tensor) -> Tensor:
    """(rows, pieces, tags) -> (rows, pieces): the Trainer need not keep the logits."""
    answers: Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)
    return answers


def _measured(
    names: list[str], cut: dict[str, list[list[str]]], name: str, prediction: EvalPrediction
) -> dict[str, float]:
    answers, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    gold, found = [], []
    for row, marks in zip(answers, labels, strict=True):
        counts = marks != IGNORED
        gold.append([names[mark] for mark in marks[counts]])
        found.append([names[mark] for mark in row[counts]])
    unseen = cut[name]
    return span_scores(found + [["O"] * len(tags) for tags in unseen], gold + unseen)


def _baselines(train: Dataset, evals: dict[str, Dataset], names: list[str]) -> dict[str, float]:
    """What the most frequent tag reaches everywhere."""
    usual = names[Counter(tag for tags in train["tags"][:] for tag in tags).most_common(1)[0][0]]
    reached = []
    for rows in evals.values():
        gold = [[names[tag] for tag in tags] for tags in rows["tags"][:]]
        reached.append(span_scores([[usual] * len(tags) for tags in gold], gold))
    return {key: float(np.mean([r[key] for r in reached])) for key in ("f1", "tag_accuracy")}


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda _options: "f1",
    task_type="TOKEN_CLS",
    auto_class="AutoModelForTokenClassification",
)
