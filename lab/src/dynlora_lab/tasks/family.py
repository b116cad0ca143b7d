"""The task interface: what a family of tasks gives to a run.

A family is one file of this folder that ends in ``FAMILY = Family(...)`` and one line in
:data:`FAMILIES`. A recipe chooses it by its field ``task``; the recipe's section ``options`` holds
the family's own fields. The run calls, in this order:

1. ``build(family.options, {...})``: a frozen dataclass; ``__post_init__`` checks ranges (ValueError).
2. ``family.read(options, splits)``: takes the raw rows that :mod:`dynlora_lab.tasks.data` has read,
   checks them (missing columns, empty texts, labels that differ between splits: RecipeError) and
   returns them as :class:`TaskData`. No model and no tokenizer yet; ``--dry-run`` comes here too.
3. ``family.prepare(options, data, base)``: loads processor and model through ``base`` (a
   :class:`~dynlora_lab.tasks.base_model.BaseModel`; with ``--dry-run`` its models are shapes without
   weights), tokenises, and returns :class:`Prepared`.

The run then adds the adapter, makes the trainer, trains, evaluates, and writes. A family never
sees the method, and a method never sees the family.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.typed_fields import RecipeError, unknown_name
from dynlora_lab.tasks.written import Written

FAMILIES = {
    "text-classification": "dynlora_lab.tasks.text_classification",
    "question-answering": "dynlora_lab.tasks.question_answering",
    "seq2seq": "dynlora_lab.tasks.seq2seq",
    "causal-lm": "dynlora_lab.tasks.causal_lm",
    "token-classification": "dynlora_lab.tasks.token_classification",
    "image-classification": "dynlora_lab.tasks.image_classification",
    "speech-to-text": "dynlora_lab.tasks.speech_to_text",
    "image-text-to-text": "dynlora_lab.tasks.image_text_to_text",
}
"""Task name in a recipe to the module that holds its FAMILY; imported only when chosen."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Checked rows, and what the family learnt from them.

    Attributes:
        train: rows to train on.
        evals: rows to measure on, by name; a single set has the name "".
        labels: class names in the order of the model's outputs; None for a task without classes.
        facts: whatever else the family learnt; passed on to ``prepare``.
        baselines: metric name to what an answer without a model reaches, such as the majority class:
            ``{"accuracy": 0.236}``.
        notes: lines on the rows for the user, such as how many texts are blank.
    """

    train: Dataset
    evals: Mapping[str, Dataset]
    labels: list[str] | None = None
    facts: Any = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a Trainer needs, still without an adapter.

    Attributes:
        model: the base with its head; without weights when ``base.is_skeleton``.
        processor: tokenizer, image processor or feature extractor; passed to the Trainer as
            ``processing_class``, hence saved beside the adapter.
        head: names of modules with newly drawn weights; trained fully, saved with the adapter, never
            adapted, and not counted as adapter parameters.
        train: rows as the collator takes them.
        evals: the same for each evaluation set, by the names of TaskData.
        collator: None for the trainer's own.
        compute_metrics: (name of the evaluation set, prediction) -> metric name to value, without
            the prefix ``eval_``. A closure over the raw rows does post-processing (spans, decoding).
        trainer_options: further arguments of ``trainer_class`` (``preprocess_logits_for_metrics``).
        written: where ``compute_metrics`` notes the texts that it scored.
        known_loss: (model) -> ``nll`` and ``tokens`` on data of the base's own domain, asked for before
            and after training; None where the recipe names none.
    """

    model: PreTrainedModel
    processor: Any
    head: list[str]
    train: Dataset
    evals: Mapping[str, Dataset]
    collator: Any = None
    compute_metrics: Callable[[str, EvalPrediction], dict[str, float]] | None = None
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    written: Written = field(default_factory=Written)
    known_loss: Callable[[nn.Module], dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of tasks.

    Attributes:
        options: frozen dataclass of the fields in the recipe's section ``options``.
        read: raw splits -> checked rows.
        prepare: checked rows -> data sets, model and metrics.
        best_metric: (options) -> metric that chooses the best checkpoint and that a table shows,
            without the prefix ``eval_`` and without the name of an evaluation set.
        is_better_higher: (options) -> whether more of it is better.
        task_type: PEFT's task type ("SEQ_CLS", "CAUSAL_LM", …), None for models PEFT has no class for.
        auto_class: transformers' class that loads a finished model, for the model card.
        trainer: the Trainer class.
        arguments: the class of its arguments; a recipe's section ``training`` may hold any of its
            fields.
        counts_tokens: whether the model divides its loss by the number of tokens in the whole batch
            (``num_items_in_batch``), as decoders do. False: the loss is a mean, which Trainer would
            multiply by accumulation steps and processes if it were not told.
        rows_trained: (prepared, arguments) -> rows of which an epoch consists, where the trainer itself
            still packs or drops some.
        defaults: (options) -> fields of ``arguments`` that the family needs, which a recipe may
            still override.
    """

    options: type
    read: Callable[[Any, Splits], TaskData]
    prepare: Callable[[Any, TaskData, BaseModel], Prepared]
    best_metric: Callable[[Any], str]
    is_better_higher: Callable[[Any], bool] = lambda _options: True
    task_type: str | None = None
    auto_class: str = "AutoModel"
    trainer: type[Trainer] = Trainer
    arguments: type[TrainingArguments] = TrainingArguments
    counts_tokens: bool = False
    rows_trained: Callable[[Prepared, Any], int] = lambda prepared, _arguments: len(prepared.train)
    defaults: Callable[[Any], dict[str, Any]] = lambda _options: {}


def family_named(name: str) -> Family:
    """The family that a recipe's ``task`` names.

    Raises:
        RecipeError: there is none of that name, or one of its packages is not installed.
    """
    if name not in FAMILIES:
        raise RecipeError(unknown_name("task", name, FAMILIES))
    try:
        family: Family = importlib.import_module(FAMILIES[name]).FAMILY
    except ModuleNotFoundError as missing:
        raise RecipeError(
            f"task {name!r} needs the package {missing.name}; pip install 'dynlora-lab[tasks]'."
        ) from missing
    return family
