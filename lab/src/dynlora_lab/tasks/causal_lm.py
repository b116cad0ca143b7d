"""Causal language models on plain text or instructions, through TRL's SFTTrainer."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from trl import SFTConfig, SFTTrainer

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits, need_columns, need_filled, need_texts
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.forgetting import known_texts, text_loss
from dynlora_lab.tasks.scoring.perplexity import perplexity, row_losses
from dynlora_lab.tasks.scoring.summaries import rouge_scores
from dynlora_lab.tasks.scoring.translations import translation_scores
from dynlora_lab.tasks.typed_fields import RecipeError
from dynlora_lab.tasks.written import Written

Layout = Literal["text", "instruction", "messages"]
Generation = Literal["rouge", "bleu"]

PREPARING = (
    "seed", "max_length", "packing", "packing_strategy", "truncation_mode", "shuffle_dataset",
    "dataset_text_field", "dataset_num_proc", "dataset_kwargs", "completion_only_loss",
    "assistant_only_loss", "chat_template_path", "eos_token", "pad_token",
)  # fmt: skip
"""Arguments that decide which rows TRL makes."""

GENERATED_AT_ONCE = 8  # rows

SCORES: dict[str, Callable[[list[str], list[str]], dict[str, float]]] = {
    "rouge": rouge_scores,
    "bleu": translation_scores,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``causal-lm``.

    Attributes:
        layout: ``text``: a text column, every token counts. ``instruction``: an instruction and an
            answer; ``messages``: a list of ``{role, content}`` whose last one is the answer. With both
            only the answer counts, and the tokenizer's chat template, where it has one, is put around.
        text: text column of the first layout.
        prompt, answer: text columns of the second; ``prompt`` may also be a template over columns,
            such as "Rewrite in modern English: {source}".
        messages: column of the third.
        max_length: tokens of a row; more are cut off, or with ``packing`` go on in the next row.
        packing: rows of plain text are joined and cut into full rows of ``max_length``.
        generate: write answers for the first ``generate_rows`` rows when measuring, and score them.
        generate_rows, max_new_tokens: how many, and how long.
        rule: regular expression that a right answer holds somewhere, such as a format, or with ``(?!…)``
            words that it must not hold; ``rule_kept`` is the percentage of answers that do.
        forgetting: data of the base's own domain, named as in ``data.name``: the loss on its split
            ``train`` is measured before and after training and recorded as ``forgetting``.
        forgetting_text, forgetting_rows: its text column, and how many rows count.
    """

    layout: Layout = "text"
    text: str = "text"
    prompt: str = "prompt"
    answer: str = "answer"
    messages: str = "messages"
    max_length: int = 512
    packing: bool = False
    generate: Generation | None = None
    generate_rows: int = 32
    max_new_tokens: int = 64
    rule: str | None = None
    forgetting: str | None = None
    forgetting_text: str = "text"
    forgetting_rows: int = 64

    def __post_init__(self) -> None:
        """Check ranges and what excludes each other.

        Raises:
            ValueError: a number is out of its range, a field does not fit the layout, or the rule is no
                regular expression.
        """
        for name in ("max_length", "generate_rows", "max_new_tokens", "forgetting_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.layout == "text" and self.generate:
            raise ValueError(
                f"generate={self.generate!r} needs answers to compare with; set layout to instruction or "
                "messages, or leave generate out."
            )
        if self.rule is not None and not self.generate:
            raise ValueError(
                f"rule={self.rule!r} looks at written answers; set generate to rouge or bleu too."
            )
        try:
            re.compile(self.rule or "")
        except re.error as error:
            raise ValueError(
                f"rule={self.rule!r} must be a regular expression of Python: {error}."
            ) from error
        if self.layout != "text" and self.packing:
            raise ValueError(
                f"packing=True joins rows of plain text, and layout is {self.layout!r}; leave it out."
            )

    @property
    def is_template(self) -> bool:
        """Whether ``prompt`` is a template over columns."""
        return "{" in self.prompt


def read(options: Options, splits: Splits) -> TaskData:
    """Rows as TRL takes them: text, or prompt and completion (texts or lists of messages).

    Raises:
        RecipeError: a column is missing or empty, or messages do not end in an answer.
    """
    notes = _check_columns(options, splits)
    train, evals = splits.shaped(partial(_shaped, options=options))
    known = options.forgetting and known_texts(
        options.forgetting, column=options.forgetting_text, rows=options.forgetting_rows
    )
    return TaskData(train=train, evals=evals, notes=notes, facts=known)


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Model and tokenizer; TRL itself puts the chat template around, tokenises and packs."""
    tokenizer = base.tokenizer()
    model, new = base.model(AutoModelForCausalLM)
    _need_decoder(model, base.name)
    as_chat = partial(_templated, has_template=tokenizer.chat_template is not None)
    evals = {name: as_chat(rows) for name, rows in data.evals.items()}
    written = Written()
    known_loss = data.facts and partial(
        text_loss, tokenizer=tokenizer, texts=data.facts, max_length=options.max_length
    )
    return Prepared(
        model=model,
        processor=tokenizer,
        head=new,
        train=as_chat(data.train),
        evals=evals,
        compute_metrics=partial(_measured, options, model, tokenizer, evals, written),
        written=written,
        known_loss=known_loss or None,
    )


def _need_decoder(model: PreTrainedModel, name: str) -> None:
    """Refuse an encoder, for which transformers has a class of this task too.

    It attends to the tokens that it is to predict, and would learn to copy them. Decoders that are
    split off an encoder-decoder set ``is_decoder`` themselves, and XLM has ``causal``.
    """
    config = model.config
    is_encoder = type(config) in AutoModelForMaskedLM._model_mapping
    if is_encoder and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    ):
        raise RecipeError(
            f"model {name!r} is a {config.model_type}, an encoder, which sees the words that causal-lm "
            "has to predict; name a decoder such as a GPT-2 or a Llama, or another task."
        )


def _check_columns(options: Options, splits: Splits) -> list[str]:
    """Refuse columns that are missing or cannot be used; otherwise lines on blank texts."""
    if options.layout == "messages":
        need_columns(splits, [options.messages], option="options.messages")
        return []
    if options.layout == "text":
        columns = {"text": options.text}
    elif options.is_template:
        columns = {"answer": options.answer}
        _check_template(options, splits)
    else:
        columns = {"prompt": options.prompt, "answer": options.answer}
    for option, column in columns.items():
        need_columns(splits, [column], option=f"options.{option}")
    notes = need_texts(splits, list(columns.values()))
    if options.layout == "instruction":
        need_filled(splits, list(columns.values()))
    return notes


def _check_template(options: Options, splits: Splits) -> None:
    try:
        options.prompt.format_map(dict.fromkeys(splits.train.column_names, ""))
    except (KeyError, ValueError, IndexError) as error:
        raise RecipeError(
            f"options.prompt {options.prompt!r} does not fit the columns {splits.train.column_names} "
            f"({error!r}); write columns in braces."
        ) from error


def _shaped(rows: Dataset, *, options: Options, place: Callable[[int], str]) -> Dataset:
    if options.layout == "text":
        return Dataset.from_dict({"text": [text or "" for text in rows[options.text][:]]})
    if options.layout == "messages":
        talks = rows[options.messages][:]
        for row, talk in enumerate(talks):
            if not talk or talk[-1].get("role") != "assistant":
                raise RecipeError(
                    f"{place(row)} does not end in a message of the assistant; end it with the answer, or "
                    "leave the row out."
                )
        return Dataset.from_dict(
            {"prompt": [t[:-1] for t in talks], "completion": [t[-1:] for t in talks]}
        )
    prompts = (
        [options.prompt.format_map(row) for row in rows]
        if options.is_template
        else rows[options.prompt][:]
    )
    return Dataset.from_dict({"prompt": prompts, "completion": rows[options.answer][:]})


def _templated(rows: Dataset, *, has_template: bool) -> Dataset:
    """Instructions as a talk of two messages, if the tokenizer has a template for talks."""
    if "prompt" not in rows.column_names or not len(rows) or not isinstance(rows[0]["prompt"], str):
        return rows
    prompts, answers = rows["prompt"][:], rows["completion"][:]
    if not has_template:
        spaced = [f" {answer}" for answer in answers]  # else prompt and answer become one word
        return Dataset.from_dict({"prompt": prompts, "completion": spaced})
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in prompts],
            "completion": [[{"role": "assistant", "content": text}] for text in answers],
        }
    )


def rows_trained(prepared: Prepared, arguments: SFTConfig) -> int:
    """Rows of an epoch as TRL makes them: packed, and without those whose answer is cut off.

    TRL prepares them when its trainer is built, and a trainer needs a model with weights: a tiny one.
    """
    tiny = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **{name: getattr(arguments, name) for name in PREPARING},
        )
        trainer = SFTTrainer(
            LlamaForCausalLM(tiny),
            on_cpu,
            train_dataset=prepared.train,
            processing_class=prepared.processor,
        )
        return len(trainer.train_dataset)


class PerplexityTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's trainer, whose evaluation hands on three numbers a row instead of all logits."""

    def prediction_step(
        self, model: Any, inputs: Any, _loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean loss of the batch, (rows, 3) of ``row_losses``, and the labels."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = row_losses(model(**inputs).logits, labels)
        loss, counted, _ = rows.sum(dim=0)
        return loss / counted.clamp(min=1), rows, labels


def _measured(
    options: Options,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sets: Mapping[str, Dataset],
    written: Written,
    name: str,
    prediction: EvalPrediction,
) -> dict[str, float]:
    scores = perplexity(prediction.predictions)
    if options.generate is None:
        return scores
    rows = sets[name].select(range(min(options.generate_rows, len(sets[name]))))
    answers = _answers(model, tokenizer, rows["prompt"][:], options.max_new_tokens)
    golds = [_text(completion) for completion in rows["completion"][:]]
    asked = [_text(prompt) for prompt in rows["prompt"][:]]
    written.note(name, asked=asked, written=answers, expected=golds)
    if options.rule is not None:
        scores["rule_kept"] = rule_kept(answers, options.rule)
    return scores | SCORES[options.generate](answers, golds)


def rule_kept(answers: Sequence[str], rule: str) -> float:
    """Percent of the answers in which the regular expression ``rule`` is found.

    >>> rule_kept(["you have", "thou hast"], "^(?!.*(thou|hast))")
    50.0
    """
    return 100 * sum(re.search(rule, answer) is not None for answer in answers) / len(answers)


@torch.no_grad()
def _answers(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Any], limit: int
) -> list[str]:
    """The likeliest continuations, of at most ``limit`` tokens, batch by batch.

    Adapters are part of ``model`` by now, which PEFT changed in place.
    """
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for first in range(0, len(prompts), GENERATED_AT_ONCE):
        inputs = _prompted(tokenizer, prompts[first : first + GENERATED_AT_ONCE])
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        tokens = model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    model.train(was_training)
    tokenizer.padding_side = side
    return [answer.strip() for answer in answers]


def _prompted(tokenizer: Tokenizer, prompts: Sequence[Any]) -> dict[str, Any]:
    if isinstance(prompts[0], str):
        return dict(tokenizer(list(prompts), padding=True, return_tensors="pt"))
    return dict(
        tokenizer.apply_chat_template(
            list(prompts),
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
    )


def _text(completion: Any) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda _options: "perplexity",
    is_better_higher=lambda _options: False,
    task_type="CAUSAL_LM",
    auto_class="AutoModelForCausalLM",
    trainer=PerplexityTrainer,
    arguments=SFTConfig,
    counts_tokens=True,
    rows_trained=rows_trained,
    defaults=lambda options: {
        "max_length": options.max_length,
        "packing": options.packing,
        "packing_strategy": "wrapped",  # needs no attention kernel of its own
        "eval_packing": options.packing,
        "bf16": False,  # SFTConfig's own default is True, on a CPU too
        "gradient_checkpointing": False,
        "learning_rate": 5e-4,
        "per_device_eval_batch_size": 4,
    },
)
