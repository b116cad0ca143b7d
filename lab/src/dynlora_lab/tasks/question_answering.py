"""Extractive question answering in the layout of SQuAD v1 and v2: the answer is a part of the context."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.base_model import BaseModel, outside_the_trunk
from dynlora_lab.tasks.data import Splits, need_columns, need_filled, need_texts
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.scoring.answer_spans import SpanSettings, Window, best_answers
from dynlora_lab.tasks.scoring.squad import Version, squad_scores
from dynlora_lab.tasks.typed_fields import RecipeError

GOLDS = "golds"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``question-answering``.

    Attributes:
        version: ``v2`` has questions without an answer.
        question, context, answers: columns; ``answers`` holds ``{text: […], answer_start: […]}``.
        max_length: tokens of a window: question, a part of the context, special tokens.
        stride: tokens that neighbouring windows of a context share.
        max_answer_tokens: longer answers are not given.
        null_threshold: v2: "no answer" if its score leads the best span's by more than this.
    """

    version: Version = "v1"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    max_length: int = 384
    stride: int = 128
    max_answer_tokens: int = 30
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of its range.
        """
        for name in ("max_length", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.stride < self.max_length:
            raise ValueError(
                f"stride={self.stride} must lie in 0..max_length={self.max_length} - 1: windows of that "
                "many tokens share it."
            )

    @property
    def spans(self) -> SpanSettings:
        """How answers are chosen from logits."""
        return SpanSettings(
            max_answer_tokens=self.max_answer_tokens,
            allow_no_answer=self.version == "v2",
            null_threshold=self.null_threshold,
        )


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the columns question, context, golds (texts) and starts (characters).

    Raises:
        RecipeError: a column is missing or empty, answers have another layout or stand elsewhere than
            they say, or v1 data hold a question without an answer.
    """
    columns = {"question": options.question, "context": options.context}
    for option, column in (*columns.items(), ("answers", options.answers)):
        need_columns(splits, [column], option=f"options.{option}")
    need_texts(splits, list(columns.values()))
    need_filled(splits, list(columns.values()))
    train, evals = splits.shaped(partial(_checked, options=options))
    return TaskData(train=train, evals=evals, baselines=_baselines(options, evals))


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Windows of all contexts; a window that lacks the answer points at its first token."""
    tokenizer = base.tokenizer()
    if not tokenizer.is_fast:
        raise RecipeError(
            f"model {base.name!r} has no fast tokenizer, which tells where in the context a token "
            "stands; name a model with a tokenizer.json."
        )
    model, new = base.model(AutoModelForQuestionAnswering)
    cut = partial(_windows, options=options, tokenizer=tokenizer)
    evals = {name: cut(rows) for name, rows in data.evals.items()}
    return Prepared(
        model=model,
        processor=tokenizer,
        head=new or outside_the_trunk(model),
        train=cut(data.train)[0],
        evals={name: rows for name, (rows, _) in evals.items()},
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=partial(
            _measured, options, {name: (data.evals[name], w) for name, (_, w) in evals.items()}
        ),
    )


def _checked(rows: Dataset, *, options: Options, place: Callable[[int], str]) -> Dataset:
    """One shape for what follows; numbered by row, since ids may be missing or repeat."""
    questions = [text.strip() for text in rows[options.question][:]]
    contexts, golds, starts = rows[options.context][:], [], []
    for row, (answers, context) in enumerate(zip(rows[options.answers][:], contexts, strict=True)):
        where = place(row)
        if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
            raise RecipeError(
                f"{where} has {answers!r} in {options.answers!r}; give {{text: […], answer_start: […]}}."
            )
        if options.version == "v1" and not answers["text"]:
            raise RecipeError(
                f"{where} has no answer; drop it, or set options.version to v2, where questions may have "
                "none."
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if context[start : start + len(text)] != text:
                raise RecipeError(
                    f"{where}: the answer {text!r} does not stand at character {start} of the context; "
                    "correct answer_start."
                )
        golds.append(list(answers["text"]))
        starts.append(list(answers["answer_start"]))
    return Dataset.from_dict(
        {"question": questions, "context": contexts, GOLDS: golds, "starts": starts}
    )


def _windows(
    rows: Dataset, *, options: Options, tokenizer: Tokenizer
) -> tuple[Dataset, list[Window]]:
    """Model inputs, and for each where its tokens stand in the context of which row."""
    is_context_last = tokenizer.padding_side == "right"
    pairs = (rows["question"][:], rows["context"][:])
    encoded = tokenizer(
        *(pairs if is_context_last else pairs[::-1]),
        truncation="only_second" if is_context_last else "only_first",
        max_length=min(tokenizer.model_max_length, options.max_length),
        stride=options.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    offsets, sources = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
    golds, starts = rows[GOLDS][:], rows["starts"][:]
    windows, targets = [], []
    for number, row in enumerate(sources):
        belongs = encoded.sequence_ids(number)
        side = 1 if is_context_last else 0
        window = Window(
            question=str(row),
            offsets=[
                span if part == side else None
                for span, part in zip(offsets[number], belongs, strict=True)
            ],
            null_token=_null_token(encoded["input_ids"][number], tokenizer),
        )
        windows.append(window)
        targets.append(_target(window, golds[row], starts[row]))
    first, last = (list(side) for side in zip(*targets, strict=True))
    columns = {**encoded, "start_positions": first, "end_positions": last}
    return Dataset.from_dict(columns), windows


def _null_token(tokens: Sequence[int], tokenizer: Tokenizer) -> int:
    return tokens.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in tokens else 0


def _target(window: Window, golds: Sequence[str], starts: Sequence[int]) -> tuple[int, int]:
    """First and last token of the first gold answer, if all of it lies in the window."""
    inside = [(token, span) for token, span in enumerate(window.offsets) if span is not None]
    if golds and inside:
        begin, end = starts[0], starts[0] + len(golds[0])
        if inside[0][1][0] <= begin and end <= inside[-1][1][1]:
            first = max(token for token, span in inside if span[0] <= begin)
            last = min(token for token, span in inside if span[1] >= end)
            return first, max(first, last)
    return window.null_token, window.null_token


def _measured(
    options: Options,
    sets: Mapping[str, tuple[Dataset, list[Window]]],
    name: str,
    prediction: EvalPrediction,
) -> dict[str, float]:
    rows, windows = sets[name]
    start, end = (np.asarray(logits) for logits in prediction.predictions[:2])
    contexts = {str(row): text for row, text in enumerate(rows["context"][:])}
    answers = best_answers(start, end, windows=windows, contexts=contexts, settings=options.spans)
    return squad_scores(
        {question: answer.text for question, answer in answers.items()},
        _golds(rows),
        version=options.version,
        no_answer_scores={question: answer.null_lead for question, answer in answers.items()},
    )


def _golds(rows: Dataset) -> dict[str, list[str]]:
    return {str(row): golds for row, golds in enumerate(rows[GOLDS][:])}


def _baselines(options: Options, evals: Mapping[str, Dataset]) -> dict[str, float]:
    """What "no answer" reaches everywhere."""
    reached: list[Mapping[str, Any]] = []
    for rows in evals.values():
        golds = _golds(rows)
        reached.append(squad_scores(dict.fromkeys(golds, ""), golds, version=options.version))
    both = ("f1", "exact_match" if options.version == "v1" else "exact")
    return {key: float(np.mean([scores[key] for scores in reached])) for key in both}


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda _options: "f1",
    task_type="QUESTION_ANS",
    auto_class="AutoModelForQuestionAnswering",
)
