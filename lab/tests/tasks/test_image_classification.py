"""Pictures: inputs without torchvision, a whole run on a tiny ViT, and what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Features
from transformers import ViTConfig, ViTForImageClassification

from dynlora_lab.tasks.image_classification import Options, read
from dynlora_lab.tasks.pixels import Pixels, pixels_for
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, splits_of

GREY = Pixels(size=(2, 2), channels=1, mean=(0.5,), std=(0.25,))
FEATURES = Features(image=Array2D((8, 8), "uint8"), label=ClassLabel(names=["dark", "light"]))


def picture(label, seed):
    shades = np.random.default_rng(seed).integers(0, 100, (8, 8))
    return {"image": (shades + 120 * label).astype(np.uint8).tolist(), "label": label}


ROWS = [picture(seed % 2, seed) for seed in range(32)]


def test_a_run_on_arrays_learns_and_saves_a_processor_that_transformers_reads(tmp_path):
    config = ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, num_labels=5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    record = run_rows(
        tmp_path,
        splits_of(ROWS, features=FEATURES),
        task="image-classification",
        model=str(tmp_path / "base"),
        training={"num_train_epochs": 8},
    ).record
    assert record["baselines"] == {"accuracy": 0.5}
    assert record["metrics"]["eval_accuracy"] == 1.0
    saved = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 16, "width": 16}
    assert saved["image_processor_type"] == "ViTImageProcessor"
    assert pixels_for(str(tmp_path / "run"), config).mean == (0.5,)


def test_whole_numbers_are_of_255_and_fractions_of_1():
    dark_and_light = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    expected = torch.tensor([[[-2.0, 2.0], [2.0, -2.0]]])
    torch.testing.assert_close(GREY(dark_and_light), expected)
    torch.testing.assert_close(GREY(dark_and_light / 255), expected)


def test_colours_become_grey_by_the_eye_and_grey_becomes_three_equal_channels():
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[..., 0] = 255
    plain = Pixels(size=(2, 2), channels=1, mean=(0.0,), std=(1.0,))
    torch.testing.assert_close(plain(red), torch.full((1, 2, 2), 0.299))
    with_opacity = np.concatenate([red, np.full((2, 2, 1), 9, np.uint8)], axis=-1)
    torch.testing.assert_close(plain(with_opacity), plain(red))
    three = Pixels(size=(2, 2), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert three(np.full((2, 2), 51, np.uint8)).unique().tolist() == [pytest.approx(0.2)]


def test_a_picture_is_resized_to_the_model_and_keeps_its_mean():
    shades = np.random.default_rng(0).random((9, 13)).astype(np.float32)
    small = Pixels(size=(4, 5), channels=1, mean=(0.0,), std=(1.0,))(shades)
    assert small.shape == (1, 4, 5)
    assert small.mean().item() == pytest.approx(shades.mean(), abs=0.05)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image of shape \(2, 2, 7\): give"):
        GREY(np.zeros((2, 2, 7)))


def test_a_class_that_training_never_shows_is_refused():
    named = [{**row, "label": str(row["label"])} for row in ROWS]
    odd = [{**named[0], "label": "blue"}]
    with pytest.raises(RecipeError, match="label 'blue' occurs in .* but not in train"):
        read(Options(), splits_of(named, odd))
