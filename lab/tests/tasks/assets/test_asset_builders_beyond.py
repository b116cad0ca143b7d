"""Scenes with questions, bad telephone lines, Debian's descriptions, and the model of the scenes."""

import io
import wave

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features
from transformers import AutoModelForImageTextToText, AutoProcessor, ViTModel

from dynlora_lab.tasks.assets import debian, llava, scenes
from dynlora_lab.tasks.assets.cache import AssetError
from dynlora_lab.tasks.assets.noise import BAND_HZ, bad_line
from dynlora_lab.tasks.assets.pictures import CLOTHES, _vit_config
from dynlora_lab.tasks.assets.speech import build_noisy_prompts
from dynlora_lab.tasks.assets.tables import write_parquet
from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.image_text_to_text import Options, batch_of, read
from test_asset_builders import rows_of, write_files

RATE = 8000


@pytest.fixture(autouse=True)
def _tables_read_here(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "read")


def plain_pictures(folder, names):
    """Ten classes, the pictures of class k all of the shade 20 (k + 1)."""
    folder.mkdir()
    labels = list(range(10)) * 2
    images = [np.full((28, 28), 20 * (label + 1), dtype=np.uint8) for label in labels]
    features = Features(image=Array2D((28, 28), "uint8"), label=ClassLabel(names=list(names)))
    rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
    for split in ("train", "validation"):
        write_parquet(rows, folder / f"{split}.parquet")


def scenes_of(tmp_path, monkeypatch, build, source, names, rows=200):
    monkeypatch.setattr(scenes, "ROWS", {"train": rows, "validation": 50})
    plain_pictures(tmp_path / source, names)
    destination = tmp_path / "scenes"
    destination.mkdir()
    build({source: tmp_path / source}, destination)
    return destination


def test_the_answers_are_what_is_in_the_pictures(tmp_path, monkeypatch):
    folder = scenes_of(
        tmp_path, monkeypatch, scenes.build_digit_scenes, "mnist", [str(d) for d in range(10)]
    )
    rows = rows_of(folder)
    assert {split: len(part) for split, part in rows.items()} == {"train": 200, "validation": 50}
    kinds = Dataset.from_parquet(str(folder / "train.parquet")).features["kind"]
    asked = set()
    for row in rows["train"]:
        image = np.array(row["image"])
        shades = (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1])
        corners = dict(zip(scenes.CORNERS, shades, strict=True))
        seen = {c: scenes.NUMBERS[shade // 20 - 1] for c, shade in corners.items() if shade}
        assert [c + 1 for c in row["corners"]] == [shade // 20 for shade in shades]
        kind, question = kinds.int2str(row["kind"]), row["question"]
        asked.add(kind)
        if kind == "what":
            corner = question.removeprefix("what is at the ").removesuffix(" ?")
            assert row["answer"] == seen[corner]
        elif kind == "which":
            thing = question.removeprefix("where is the ").removesuffix(" ?")
            assert [c for c, name in seen.items() if name == thing] == [row["answer"]]
        else:
            assert row["answer"] == scenes.NUMBERS[len(seen)]
    assert asked == {"what", "which", "count"}


def test_the_model_of_the_scenes_loads_and_its_answers_are_where_the_processor_puts_them(
    tmp_path, monkeypatch
):
    folder = scenes_of(
        tmp_path, monkeypatch, scenes.build_clothes_scenes, "fashion-mnist", CLOTHES, rows=80
    )
    monkeypatch.setattr(llava, "STEPS", 3)
    monkeypatch.setattr(llava, "SEEING_STEPS", 2)
    torch.manual_seed(1)
    vit = ViTModel(_vit_config(CLOTHES), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    (tmp_path / "model").mkdir()
    llava.build_llava(
        {"vit-fashion-mnist": tmp_path / "vit", "clothes-scenes": folder}, tmp_path / "model"
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    train = Dataset.from_parquet(str(folder / "train.parquet"))
    rows = read(Options(group="kind"), Splits(train=train, evals={"": train})).train
    batch = batch_of(processor, [rows[row] for row in range(16)])
    pixels, tokens, labels = llava._inputs(train.select(range(16)), processor.tokenizer, patches=16)
    assert torch.equal(batch["input_ids"], tokens)
    assert torch.equal(batch["labels"], labels)
    torch.testing.assert_close(batch["pixel_values"], pixels, atol=1e-5, rtol=0)
    unknown = processor.tokenizer.unk_token_id
    assert not (batch["input_ids"] == unknown).any()
    assert model(**batch).loss.isfinite()


def test_in_colour_the_first_layers_compute_what_they_did_in_grey():
    grey = ViTModel(_vit_config(CLOTHES), add_pooling_layer=False).eval()
    picture = torch.rand(2, 1, 28, 28)
    colour = llava._in_colour(grey).eval()
    in_grey = grey(picture, output_hidden_states=True).hidden_states
    in_colour = colour(picture.expand(-1, 3, -1, -1), output_hidden_states=True).hidden_states
    assert len(in_colour) == 1 + llava.LAYERS < len(in_grey)
    torch.testing.assert_close(in_colour[1], in_grey[1])
    torch.testing.assert_close(in_colour[2], in_grey[2])


def test_a_bad_line_is_as_loud_as_it_says_and_keeps_to_the_band():
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    heard = bad_line(tone, RATE, seed=3)
    assert np.abs(heard).max() == pytest.approx(0.9)
    power = np.abs(np.fft.rfft(heard)) ** 2  # a bin is 1 Hz
    inside = power[int(BAND_HZ[0]) : int(BAND_HZ[1])].sum()
    assert inside > 0.99 * power.sum()
    assert np.array_equal(heard, bad_line(tone, RATE, seed=3))
    assert not np.allclose(heard, bad_line(tone, RATE, seed=4))


def test_noisy_prompts_keep_their_wording_and_their_length(tmp_path):
    file = io.BytesIO()
    with wave.open(file, "wb") as spoken:
        spoken.setnchannels(1)
        spoken.setsampwidth(2)
        spoken.setframerate(RATE)
        tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(2000) / RATE)
        spoken.writeframes(tone.astype("<i2").tobytes())
    row = {"audio": {"bytes": file.getvalue(), "path": "a.wav"}, "text": "one tone"}
    for split in ("train", "validation"):
        (tmp_path / "clean").mkdir(exist_ok=True)
        write_parquet(Dataset.from_list([row]), tmp_path / "clean" / f"{split}.parquet")
    (tmp_path / "noisy").mkdir()
    build_noisy_prompts({"phone-prompts": tmp_path / "clean"}, tmp_path / "noisy")
    (made,) = rows_of(tmp_path / "noisy")["train"]
    assert (made["text"], made["audio"]["path"]) == ("one tone", "a.wav")
    with wave.open(io.BytesIO(made["audio"]["bytes"])) as heard:
        assert (heard.getframerate(), heard.getnframes()) == (RATE, 2000)
    assert made["audio"]["bytes"] != row["audio"]["bytes"]


WORDS = " ".join(f"word{number}" for number in range(30))
INDEX = {
    "deb_main_binary-amd64_Packages": (
        "Package: cat\nSource: felines (1.0)\nDescription-md5: 1\n\n"
        "Package: kitten\nSource: felines\nDescription-md5: 2\n\n"
        "Package: dog\nDescription-md5: 3\n\n"
        "Package: fish\nDescription-md5: 9\n"
    ),
    "deb_main_i18n_Translation-en": (
        f"Package: cat\nDescription-md5: 1\nDescription-en: small feline\n {WORDS}\n .\n end\n\n"
        f"Package: kitten\nDescription-md5: 2\nDescription-en: smaller feline\n {WORDS}\n\n"
        "Package: dog\nDescription-md5: 3\nDescription-en: canine\n too short\n"
    ),
    "security_main_i18n_Translation-en": "Package: x\nDescription-md5: 7\nDescription-en: x\n",
    "deb_main_i18n_Translation-it": (
        "Package: cat\nDescription-md5: 1\nDescription-it: piccolo felino\n x\n\n"
        "Package: dog\nDescription-md5: 3\nDescription-it: canine\n x\n\n"
        "Package: gone\nDescription-md5: 5\nDescription-it: perduto\n x\n"
    ),
}


def test_a_synopsis_stands_above_a_long_description_once_for_each_source(tmp_path):
    write_files(tmp_path, INDEX)
    expected = {"document": f"{WORDS} end", "summary": "small feline", "package": "felines"}
    assert list(debian.synopses(tmp_path)) == [expected]


def test_translations_are_those_of_lines_that_both_languages_have_and_write_differently(tmp_path):
    write_files(tmp_path, INDEX)
    expected = {"source": "small feline", "target": "piccolo felino"}
    assert list(debian.translations(tmp_path, "it")) == [expected]


def test_an_index_without_descriptions_is_refused(tmp_path):
    with pytest.raises(AssetError, match="holds no Translation-en; name a Debian archive"):
        list(debian.synopses(tmp_path))
