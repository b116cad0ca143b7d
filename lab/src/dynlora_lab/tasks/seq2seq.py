"""Text to text with encoder-decoder models: summaries, translations, rewriting."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits, need_columns, need_texts
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.scoring.perplexity import IGNORED
from dynlora_lab.tasks.scoring.summaries import rouge_scores
from dynlora_lab.tasks.scoring.translations import translation_scores
from dynlora_lab.tasks.typed_fields import RecipeError
from dynlora_lab.tasks.written import Written

Kind = Literal["summarization", "translation"]
Score = Callable[[Sequence[str], Sequence[str]], dict[str, float]]

SCORES: dict[str, Score] = {"summarization": rouge_scores, "translation": translation_scores}
BEST = {"summarization": "rougeL", "translation": "chrf"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``seq2seq``.

    Attributes:
        kind: ``summarization`` measures ROUGE, ``translation`` (any rewriting) sacreBLEU and chrF.
        source, target: text columns; ``translation.de`` is the field ``de`` of a column of mappings.
        prefix: put before every source, such as "summarize: ".
        source_language, target_language: codes of a multilingual tokenizer, such as "de_DE".
        max_source_length, max_target_length: tokens; more are cut off.
        num_beams: of the beam search that measures.
        train_fully: modules, by the end of their name, that are trained whole and saved with the
            adapter: cross-attention that no checkpoint has, for instance.
    """

    kind: Kind = "summarization"
    source: str = "document"
    target: str = "summary"
    prefix: str = ""
    source_language: str | None = None
    target_language: str | None = None
    max_source_length: int = 768
    max_target_length: int = 64
    num_beams: int = 3
    train_fully: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of its range.
        """
        for name in ("max_source_length", "max_target_length", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the text columns source (prefixed) and target.

    Raises:
        RecipeError: a column is missing or holds no text.
    """
    flat = dataclasses.replace(
        splits,
        train=splits.train.flatten(),
        evals={name: rows.flatten() for name, rows in splits.evals.items()},
    )
    need_columns(flat, [options.source], option="options.source")
    need_columns(flat, [options.target], option="options.target")
    notes = need_texts(flat, [options.source, options.target])
    evals = {name: _pairs(rows, options) for name, rows in flat.evals.items()}
    return TaskData(
        train=_pairs(flat.train, options),
        evals=evals,
        baselines=_baselines(options, evals),
        notes=notes,
    )


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Token ids of both sides; evaluation writes with beam search and scores texts."""
    languages = {"src_lang": options.source_language, "tgt_lang": options.target_language}
    tokenizer = base.tokenizer(**{k: v for k, v in languages.items() if v})
    model, new = base.model(AutoModelForSeq2SeqLM)
    if options.target_language:
        start = tokenizer.convert_tokens_to_ids(options.target_language)
        if start in (None, tokenizer.unk_token_id):
            raise RecipeError(
                f"options.target_language {options.target_language!r} is no token of {base.name!r}; give "
                "the code that its tokenizer knows."
            )
        model.generation_config.forced_bos_token_id = start
    head = sorted({*new, *_named(model, options.train_fully)})
    encode = partial(_encoded, options=options, tokenizer=tokenizer)
    texts = {name: (rows["source"][:], rows["target"][:]) for name, rows in data.evals.items()}
    written = Written()
    return Prepared(
        model=model,
        processor=tokenizer,
        head=head,
        train=encode(data.train),
        evals={name: encode(rows) for name, rows in data.evals.items()},
        collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        compute_metrics=partial(_measured, options, tokenizer, texts, written),
        written=written,
    )


def decoded(prediction: EvalPrediction, tokenizer: Tokenizer) -> list[str]:
    """Generated token ids, padded with -100 by the Trainer, as texts."""
    tokens = prediction.predictions
    tokens = np.asarray(tokens[0] if isinstance(tokens, tuple) else tokens)
    filled = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
    texts = tokenizer.batch_decode(filled, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _pairs(rows: Dataset, options: Options) -> Dataset:
    source = [options.prefix + (text or "") for text in rows[options.source][:]]
    target = [text or "" for text in rows[options.target][:]]
    return Dataset.from_dict({"source": source, "target": target})


def _named(model: Any, endings: tuple[str, ...]) -> list[str]:
    """Full names of the modules that end so.

    Raises:
        RecipeError: an ending fits none.
    """
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for ending in endings:
        fit = [name for name in names if f".{name}".endswith(f".{ending}")]
        if not fit:
            leaves = sorted({name.rpartition(".")[2] for name in names if name})
            raise RecipeError(f"options.train_fully: no module ends in {ending!r}; try {leaves}.")
        found += fit
    return found


def _encoded(rows: Dataset, *, options: Options, tokenizer: Tokenizer) -> Dataset:
    source_limit = min(tokenizer.model_max_length, options.max_source_length)
    encoded = tokenizer(rows["source"][:], truncation=True, max_length=source_limit)
    target = tokenizer(
        text_target=rows["target"][:], truncation=True, max_length=options.max_target_length
    )
    kept = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**kept, "labels": target["input_ids"]})


def _measured(
    options: Options,
    tokenizer: Tokenizer,
    texts: Mapping[str, tuple[list[str], list[str]]],
    written: Written,
    name: str,
    prediction: EvalPrediction,
) -> dict[str, float]:
    answers, (sources, targets) = decoded(prediction, tokenizer), texts[name]
    written.note(name, asked=sources, written=answers, expected=targets)
    return SCORES[options.kind](answers, targets)


def _baselines(options: Options, evals: Mapping[str, Dataset]) -> dict[str, float]:
    """What the source itself reaches: its first words for a summary, all of it for a translation."""
    reached = []
    for rows in evals.values():
        copies = [text.removeprefix(options.prefix) for text in rows["source"][:]]
        if options.kind == "summarization":
            copies = [" ".join(text.split()[: options.max_target_length // 2]) for text in copies]
        reached.append(SCORES[options.kind](copies, rows["target"][:]))
    return {key: float(np.mean([scores[key] for scores in reached])) for key in reached[0]}


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda options: BEST[options.kind],
    task_type="SEQ_2_SEQ_LM",
    auto_class="AutoModelForSeq2SeqLM",
    trainer=Seq2SeqTrainer,
    arguments=Seq2SeqTrainingArguments,
    defaults=lambda options: {
        "predict_with_generate": True,
        "generation_max_length": options.max_target_length,
        "generation_num_beams": options.num_beams,
    },
)
