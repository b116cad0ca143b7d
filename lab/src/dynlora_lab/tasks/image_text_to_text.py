"""Questions about pictures, and captions, with any model of ``AutoModelForImageTextToText``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction, Trainer
from transformers import PreTrainedModel as Model

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits, need_columns, need_filled, need_texts
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.scoring.perplexity import IGNORED, perplexity, row_losses
from dynlora_lab.tasks.scoring.short_answers import exact_matches
from dynlora_lab.tasks.scoring.summaries import rouge_scores
from dynlora_lab.tasks.typed_fields import RecipeError
from dynlora_lab.tasks.written import Written

Metric = Literal["exact_match", "rouge"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``image-text-to-text``.

    Attributes:
        image: column with pictures: arrays of 0..255, or what a hub data set decodes with Pillow.
        prompt, answer: text columns; for captions ``prompt`` may be a sentence without a column, such
            as "Describe the picture.", where ``is_column`` is false.
        is_column: whether ``prompt`` names a column.
        metric: ``exact_match`` for short answers, ``rouge`` for captions.
        group: column of kinds of questions, each of which gets a score of its own; None: there is none.
        generate_rows: write answers for the first so many rows when measuring.
        max_new_tokens: of an answer.
    """

    image: str = "image"
    prompt: str = "question"
    answer: str = "answer"
    is_column: bool = True
    metric: Metric = "exact_match"
    group: str | None = None
    generate_rows: int = 500
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of its range, or a sentence is asked for that is empty.
        """
        for name in ("generate_rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.group is not None and self.metric != "exact_match":
            raise ValueError(
                f"group={self.group!r} counts exact matches by kind, and metric is {self.metric!r}; leave "
                "one of them out."
            )


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the columns image, question, answer, and kind (a text, "" without groups).

    Raises:
        RecipeError: a column is missing, or a question or an answer is empty.
    """
    texts = {"prompt": options.prompt} if options.is_column else {}
    texts["answer"] = options.answer
    others = {"image": options.image} | ({"group": options.group} if options.group else {})
    for option, column in (*others.items(), *texts.items()):
        need_columns(splits, [column], option=f"options.{option}")
    need_texts(splits, list(texts.values()))
    need_filled(splits, list(texts.values()))
    evals = {name: _shaped(rows, options) for name, rows in splits.evals.items()}
    train = _shaped(splits.train, options)
    return TaskData(train=train, evals=evals, baselines=_baselines(options, train, evals))


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Model and processor; pictures and texts become inputs batch by batch, in the collator."""
    processor = _processor(base)
    model, new = base.model(AutoModelForImageTextToText)
    written = Written()
    return Prepared(
        model=model,
        processor=processor,
        head=new,
        train=data.train,
        evals=data.evals,
        collator=partial(batch_of, processor),
        compute_metrics=partial(_measured, options, model, processor, data.evals, written),
        written=written,
    )


class AnswerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """The Trainer, whose evaluation hands on three numbers a row instead of all logits."""

    def prediction_step(
        self, model: Any, inputs: Any, _loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss of the batch, (rows, 3) of ``row_losses``, and (rows, 1) of zeros."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = row_losses(model(**inputs).logits, labels)
        loss, counted, _ = rows.sum(dim=0)
        return loss / counted.clamp(min=1), rows, torch.zeros(len(rows), 1, device=rows.device)


def batch_of(processor: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the model is trained on: prompt and answer, of which only the answer counts.

    Args:
        processor: of the model, with a chat template.
        rows: of :func:`read`.

    Raises:
        RecipeError: the chat template changes what stands before an answer.
    """
    processor.tokenizer.padding_side = "right"
    asked = _processed(processor, rows, with_answer=False)
    whole = _processed(processor, rows, with_answer=True)
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, IGNORED)
    for row, length in enumerate(asked["attention_mask"].sum(dim=1).tolist()):
        if not torch.equal(whole["input_ids"][row, :length], asked["input_ids"][row, :length]):
            raise RecipeError(
                "the model's chat template writes another prompt before an answer than when it asks for "
                "one, so that the two cannot be told apart; set a template on the processor that does not."
            )
        labels[row, :length] = IGNORED
    return {**whole, "labels": labels}


@torch.no_grad()
def answers_of(
    model: Model, processor: Any, rows: Dataset, *, max_new_tokens: int, batch: int = 32
) -> list[str]:
    """The likeliest answers; adapters are part of ``model`` by now, which PEFT changed in place."""
    processor.tokenizer.padding_side = "left"
    was_training = model.training
    model.eval()
    texts: list[str] = []
    for first in range(0, len(rows), batch):
        chosen = [rows[row] for row in range(first, min(first + batch, len(rows)))]
        inputs = _processed(processor, chosen, with_answer=False)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    model.train(was_training)
    return [text.strip() for text in texts]


def _processor(base: BaseModel) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(
            base.name,
            revision=base.load.revision,
            trust_remote_code=base.load.trust_remote_code or None,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model {base.name!r} has no processor that can be read: {error}"
        ) from error
    if not hasattr(processor, "tokenizer") or not getattr(processor, "chat_template", None):
        raise RecipeError(
            f"model {base.name!r} has no processor of pictures and talks (a {type(processor).__name__} "
            "without a chat template); name a model that was trained to answer, such as SmolVLM-Instruct."
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _processed(
    processor: Any, rows: Sequence[Mapping[str, Any]], *, with_answer: bool
) -> dict[str, Tensor]:
    texts = [
        processor.apply_chat_template(
            _talk(row, with_answer=with_answer),
            tokenize=False,
            add_generation_prompt=not with_answer,
        )
        for row in rows
    ]
    pictures = [[picture_of(row["image"])] for row in rows]
    return dict(processor(text=texts, images=pictures, padding=True, return_tensors="pt"))


def _talk(row: Mapping[str, Any], *, with_answer: bool) -> list[dict[str, Any]]:
    asked = {"type": "text", "text": row["question"]}
    talk = [{"role": "user", "content": [{"type": "image"}, asked]}]
    if with_answer:
        talk.append({"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]})
    return talk


def picture_of(image: Any) -> Image.Image:
    """A picture in colour, as processors take it.

    Args:
        image: a Pillow picture, or an array of whole numbers 0..255, (height, width) or (height, width,
            channels).
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return Image.fromarray(np.asarray(image, dtype=np.uint8)).convert("RGB")


def _shaped(rows: Dataset, options: Options) -> Dataset:
    asked = rows[options.prompt][:] if options.is_column else [options.prompt] * len(rows)
    kinds = _names(rows, options.group) if options.group else [""] * len(rows)
    answers = rows[options.answer][:]
    kept = rows.select_columns([options.image])
    if options.image != "image":
        kept = kept.rename_column(options.image, "image")
    columns = (("question", asked), ("answer", answers), ("kind", kinds))
    for name, column in columns:
        kept = kept.add_column(name, column)
    return kept


def _names(rows: Dataset, column: str) -> list[str]:
    feature = rows.features[column]
    values = rows[column][:]
    if isinstance(feature, ClassLabel):
        return [feature.int2str(value) for value in values]
    return [str(value) for value in values]


def _measured(
    options: Options,
    model: Model,
    processor: Any,
    sets: Mapping[str, Dataset],
    written: Written,
    name: str,
    prediction: EvalPrediction,
) -> dict[str, float]:
    rows = sets[name].select(range(min(options.generate_rows, len(sets[name]))))
    answers = answers_of(model, processor, rows, max_new_tokens=options.max_new_tokens)
    golds = rows["answer"][:]
    written.note(name, asked=rows["question"][:], written=answers, expected=golds)
    return perplexity(prediction.predictions) | _scores(options)(answers, golds, rows["kind"][:])


def _scores(
    options: Options,
) -> Callable[[Sequence[str], Sequence[str], Sequence[str]], dict[str, float]]:
    if options.metric == "exact_match":
        return exact_matches
    return lambda answers, golds, _kinds: rouge_scores(answers, golds)


def _baselines(options: Options, train: Dataset, evals: Mapping[str, Dataset]) -> dict[str, float]:
    """What the most frequent answer to each question reaches: what is known without a picture."""
    usual: dict[str, dict[str, int]] = {}
    for question, answer in zip(train["question"][:], train["answer"][:], strict=True):
        counts = usual.setdefault(question, {})
        counts[answer] = counts.get(answer, 0) + 1
    best = {question: max(counts, key=counts.__getitem__) for question, counts in usual.items()}
    reached = []
    for rows in evals.values():
        guesses = [best.get(question, "") for question in rows["question"][:]]
        reached.append(_scores(options)(guesses, rows["answer"][:], rows["kind"][:]))
    return {
        key: float(np.mean([scores[key] for scores in reached if key in scores]))
        for key in reached[0]
    }


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda options: "exact_match" if options.metric == "exact_match" else "rougeL",
    auto_class="AutoModelForImageTextToText",
    trainer=AnswerTrainer,
    counts_tokens=True,
    defaults=lambda _options: {"label_names": ["labels"], "remove_unused_columns": False},
)
