"""Speech: recordings in every form a data set may hold them, a whole run on a tiny Whisper."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from dynlora_lab.tasks.speech_to_text import Options, _prompt, read, samples_of, seconds_of
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, splits_of, tiny_tokenizer

RATE = 8000
WORDS = {"low tone": 220.0, "high tone": 1760.0}


def tone(hertz, seconds=0.5, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)
    return np.repeat(wave[:, None].astype(np.float32), channels, axis=1)


def wav_bytes(values):
    file = io.BytesIO()
    soundfile.write(file, values, RATE, format="WAV")
    return file.getvalue()


def row(text, seconds=0.5):
    sound = wav_bytes(tone(WORDS[text], seconds))
    return {"audio": {"bytes": sound, "path": "a.wav"}, "text": text}


ROWS = [row(text) for text in WORDS for _ in range(4)]


def save_base(folder):
    tokenizer = tiny_tokenizer(list(WORDS), eos_token="[SEP]", bos_token="[CLS]")  # noqa: S106
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_target_positions=32, max_source_positions=1500, pad_token_id=0,
        decoder_start_token_id=2, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(
        is_multilingual=False, begin_suppress_tokens=None, suppress_tokens=None, max_length=16
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_run_hears_short_windows_and_counts_wrong_words(tmp_path):
    result = run_rows(
        tmp_path,
        splits_of(ROWS),
        task="speech-to-text",
        model=save_base(tmp_path / "base"),
        options={"max_seconds": 1.0, "max_target_length": 8},
        training={"num_train_epochs": 8},
    )
    assert result.record["metrics"]["eval_wer"] >= 0.0
    assert result.prepared.model.config.max_source_positions == 50
    assert (tmp_path / "run" / "preprocessor_config.json").is_file()
    assert (tmp_path / "run" / "tokenizer.json").is_file()


def test_recordings_are_read_from_bytes_paths_and_arrays_alike(tmp_path):
    values = tone(440.0)
    path = tmp_path / "tone.wav"
    path.write_bytes(wav_bytes(values))
    forms = [
        str(path),
        {"bytes": wav_bytes(values), "path": None},
        {"bytes": None, "path": str(path)},
        {"array": values[:, 0], "sampling_rate": RATE},
    ]
    for form in forms:
        np.testing.assert_allclose(samples_of(form, RATE), values[:, 0], atol=1e-4)
        assert seconds_of(form) == 0.5


def test_two_channels_become_one_and_the_rate_becomes_the_models():
    both = {"bytes": wav_bytes(tone(440.0, channels=2)), "path": None}
    heard = samples_of(both, 16_000)
    assert heard.shape == (RATE,)  # half a second at twice the rate
    spectrum = np.abs(np.fft.rfft(heard))
    assert np.argmax(spectrum) * 2 == 440  # bins of 2 Hz


def test_recordings_that_are_too_long_are_left_out():
    data = read(Options(max_seconds=1.0), splits_of([*ROWS, row("low tone", 1.5)], ROWS))
    assert len(data.train) == len(ROWS)
    with pytest.raises(RecipeError, match=r"no recording of train is as short.*0.1"):
        read(Options(max_seconds=0.1), splits_of(ROWS))


def test_what_is_no_recording_is_refused_with_its_row():
    broken = {"audio": {"bytes": b"no sound", "path": "b.wav"}, "text": "low tone"}
    with pytest.raises(RecipeError, match="row 1 of train: a recording cannot be read"):
        read(Options(), splits_of([ROWS[0], broken], ROWS))
    with pytest.raises(ValueError, match="type int is no path"):
        samples_of(7, RATE)


def test_a_multilingual_model_is_told_language_and_task_before_the_text():
    generation = SimpleNamespace(
        is_multilingual=True,
        lang_to_id={"<|de|>": 5, "<|en|>": 6},
        task_to_id={"transcribe": 7},
        no_timestamps_token_id=8,
    )
    assert _prompt(generation, "de") == [5, 7, 8]
    with pytest.raises(RecipeError, match=r"options.language is None.*name one of de, en"):
        _prompt(generation, None)
