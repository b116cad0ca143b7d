"""Speech to text with Whisper: recordings and their wording; the word error rate."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import EVAL, Splits, need_columns, need_filled, need_texts
from dynlora_lab.tasks.family import Family, Prepared, TaskData
from dynlora_lab.tasks.scoring.perplexity import IGNORED
from dynlora_lab.tasks.scoring.word_errors import word_error_rate
from dynlora_lab.tasks.seq2seq import decoded
from dynlora_lab.tasks.typed_fields import RecipeError
from dynlora_lab.tasks.written import Written

Samples = NDArray[np.float32]

WINDOW_S = 30.0  # Whisper hears windows of 30 s
POSITIONS_PER_S = 50  # of its encoder: 100 frames a second, every second one


@dataclass(frozen=True, kw_only=True)
class Options:
    """The recipe's section ``options`` for the task ``speech-to-text``.

    Attributes:
        audio: column with recordings: files (paths or bytes, any format of libsndfile), or arrays
            with their sampling rate, as hub data sets give them.
        text: column with what is said.
        language: code such as "de", which a multilingual model needs.
        max_seconds: longer recordings are left out, and the encoder hears windows of this length
            instead of 30 s, which makes short recordings cheap; at most 30. Below about 10 s Whisper
            tends to repeat itself.
        max_target_length: tokens of a text; more are cut off.
        num_beams: of the beam search that measures; 1 takes the likeliest token each time.
    """

    audio: str = "audio"
    text: str = "text"
    language: str | None = None
    max_seconds: float = WINDOW_S
    max_target_length: int = 128
    num_beams: int = 1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of its range.
        """
        if not 0 < self.max_seconds <= WINDOW_S:
            raise ValueError(
                f"max_seconds={self.max_seconds} must lie in (0, {WINDOW_S:g}], Whisper's window."
            )
        for name in ("max_target_length", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


def read(options: Options, splits: Splits) -> TaskData:
    """Rows with the columns audio (as it was stored) and text; recordings that are too long are out.

    Raises:
        RecipeError: a column is missing or empty, a recording cannot be read, or none is short enough.
    """
    need_columns(splits, [options.audio], option="options.audio")
    need_columns(splits, [options.text], option="options.text")
    need_texts(splits, [options.text])
    need_filled(splits, [options.text])
    return TaskData(
        train=_checked("train", options, splits),
        evals={name: _checked(name or EVAL, options, splits) for name in splits.evals},
    )


def prepare(options: Options, data: TaskData, base: BaseModel) -> Prepared:
    """Log-mel spectra and token ids; evaluation writes and counts wrong words."""
    tokenizer = base.tokenizer()
    extractor = AutoFeatureExtractor.from_pretrained(base.name)
    model, new = base.model(AutoModelForSpeechSeq2Seq)
    _shorten_(model, seconds=options.max_seconds)
    prompt = _prompt(model.generation_config, options.language)
    encode = partial(_encoded, options=options, tokenizer=tokenizer, prompt=prompt)
    references = {name: rows["text"][:] for name, rows in data.evals.items()}
    written = Written()
    return Prepared(
        model=model,
        processor=SpeechProcessor(extractor=extractor, tokenizer=tokenizer),
        head=new,
        train=encode(data.train),
        evals={name: encode(rows) for name, rows in data.evals.items()},
        collator=partial(_batch, extractor, model.config.max_source_positions),
        compute_metrics=partial(_measured, tokenizer, references, written),
        written=written,
    )


@dataclass(frozen=True, kw_only=True)
class SpeechProcessor:
    """Feature extractor and tokenizer, saved side by side as transformers' processors are."""

    extractor: Any
    tokenizer: Tokenizer

    def save_pretrained(self, folder: str, **_options: Any) -> None:
        """Write ``preprocessor_config.json`` and the tokenizer's files."""
        self.extractor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def __getattr__(self, name: str) -> Any:
        """Ids of special tokens, which the Trainer asks its processing class for."""
        if name.endswith(("_token", "_token_id")):
            return getattr(self.tokenizer, name)
        raise AttributeError(name)


def samples_of(recording: Any, rate: int) -> Samples:
    """One channel of float32 in -1..1 at ``rate`` samples a second.

    Args:
        recording: a path; ``{"bytes": …, "path": …}``; or ``{"array": …, "sampling_rate": …}``.
        rate: samples a second to return.

    Raises:
        ValueError: it is none of these, or libsndfile cannot read it.
    """
    values, found = _decoded_sound(recording)
    mono = values.mean(axis=1) if values.ndim == 2 else values
    if found != rate:
        ratio = Fraction(rate, found)
        mono = resample_poly(mono, ratio.numerator, ratio.denominator)
    return np.asarray(mono, dtype=np.float32)


def seconds_of(recording: Any) -> float:
    """How long a recording is, from the head of its file; otherwise as :func:`samples_of`."""
    if isinstance(recording, Mapping) and recording.get("array") is not None:
        return len(recording["array"]) / int(recording["sampling_rate"])
    with _opened(recording) as sound:
        return float(sound.frames / sound.samplerate)


def _decoded_sound(recording: Any) -> tuple[Samples, int]:
    """Samples, (time,) or (time, channels), and their rate."""
    if isinstance(recording, Mapping) and recording.get("array") is not None:
        return np.asarray(recording["array"], dtype=np.float32), int(recording["sampling_rate"])
    with _opened(recording) as sound:
        return sound.read(dtype="float32"), int(sound.samplerate)


def _opened(recording: Any) -> soundfile.SoundFile:
    source: Any = recording
    if isinstance(recording, Mapping):
        source = recording.get("bytes") or recording.get("path")
    if not isinstance(source, (bytes, str, Path)):
        raise ValueError(
            f"a recording of type {type(recording).__name__} is no path, no bytes and no array."
        )
    try:
        return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"a recording cannot be read: {error}") from error


def _checked(split: str, options: Options, splits: Splits) -> Dataset:
    rows = splits.each()[split]
    if isinstance(rows.features[options.audio], Audio):  # libsndfile reads it here, not torchcodec
        rows = rows.cast_column(options.audio, Audio(decode=False))
    kept = []
    for row, recording in enumerate(rows[options.audio]):
        try:
            seconds = seconds_of(recording)
        except ValueError as error:
            raise RecipeError(f"{splits.place(split, row)}: {error}") from error
        if seconds <= options.max_seconds:
            kept.append(row)
    if not kept:
        raise RecipeError(
            f"data {splits.where!r}: no recording of {split} is as short as options.max_seconds="
            f"{options.max_seconds:g}; raise it."
        )
    chosen = rows.select(kept).select_columns([options.audio, options.text])
    names = {options.audio: "audio", options.text: "text"}
    return chosen.rename_columns({old: new for old, new in names.items() if old != new})


def _encoded(
    rows: Dataset, *, options: Options, tokenizer: Tokenizer, prompt: list[int]
) -> Dataset:
    """Tokens as the model is to write them after the start token: prompt, text, end."""
    tokens = []
    for text in rows["text"][:]:
        # Whisper begins what it writes with a space
        plain = tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
        tokens.append([*prompt, *plain[: options.max_target_length - 1], tokenizer.eos_token_id])
    return rows.select_columns(["audio"]).add_column("labels", tokens)


def _batch(extractor: Any, positions: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    rate = extractor.sampling_rate
    spectra = extractor(
        [samples_of(row["audio"], rate) for row in rows],
        sampling_rate=rate,
        padding="max_length",
        max_length=positions * rate // POSITIONS_PER_S,
        truncation=True,
        return_tensors="pt",
    )
    labels = nn.utils.rnn.pad_sequence(
        [torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORED
    )
    return {"input_features": spectra["input_features"], "labels": labels}


def _prompt(generation: Any, language: str | None) -> list[int]:
    """What Whisper is told after the start token: language and task, and to leave out time stamps."""
    told = []
    if getattr(generation, "is_multilingual", False):
        languages = generation.lang_to_id
        if language is None or f"<|{language}|>" not in languages:
            known = ", ".join(sorted(token.strip("<|>") for token in languages))
            raise RecipeError(
                f"options.language is {language!r}, and this model hears several: name one of {known}."
            )
        generation.language, generation.task = language, "transcribe"
        told = [languages[f"<|{language}|>"], generation.task_to_id["transcribe"]]
    if getattr(generation, "no_timestamps_token_id", None) is not None:
        told.append(generation.no_timestamps_token_id)
    return told


def _shorten_(model: nn.Module, *, seconds: float) -> None:
    """Keep the encoder's positions of the first ``seconds``; the others' weights are left out."""
    positions = round(seconds * POSITIONS_PER_S)
    config: Any = model.config
    if positions >= config.max_source_positions:
        return
    encoder: Any = model.get_submodule("model.encoder")
    old = encoder.embed_positions.weight
    short = nn.Embedding(positions, old.shape[1], device=old.device, dtype=old.dtype)
    short.weight = nn.Parameter(old.detach()[:positions].clone(), requires_grad=False)
    encoder.embed_positions = short
    encoder.max_source_positions = config.max_source_positions = positions


def _measured(
    tokenizer: Tokenizer,
    references: Mapping[str, list[str]],
    written: Written,
    name: str,
    prediction: EvalPrediction,
) -> dict[str, float]:
    heard = decoded(prediction, tokenizer)
    written.note(name, written=heard, expected=references[name])
    return {"wer": word_error_rate(heard, references[name])}


FAMILY = Family(
    options=Options,
    read=read,
    prepare=prepare,
    best_metric=lambda _options: "wer",
    is_better_higher=lambda _options: False,
    auto_class="AutoModelForSpeechSeq2Seq",
    trainer=Seq2SeqTrainer,
    arguments=Seq2SeqTrainingArguments,
    defaults=lambda options: {
        "predict_with_generate": True,
        "generation_max_length": options.max_target_length,
        "generation_num_beams": options.num_beams,
        "label_names": ["labels"],
        "remove_unused_columns": False,  # the collator hears the recordings
    },
)
