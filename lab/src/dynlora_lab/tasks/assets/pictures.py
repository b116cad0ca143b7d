"""Small grey pictures as arrays: Fashion-MNIST, handwritten digits, and a ViT pretrained on either."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Value
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from dynlora_lab.tasks.assets.tables import write_parquet, write_split

Parts = Mapping[str, Path]

CLOTHES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"
)  # fmt: skip
DIGITS = tuple(str(digit) for digit in range(10))

BATCH = 128
LEARNING_RATE = 1e-3
MEAN, STD = 0.5, 0.5


def build_fashion_mnist(parts: Parts, destination: Path) -> None:
    """Columns image (28, 28) uint8, label (10 kinds of clothes)."""
    folder = parts["dataset-fashion-mnist"] / "usr" / "share" / "datasets" / "fashion-mnist"
    for split, name in (("train", "train"), ("validation", "t10k")):
        images = _idx(folder / f"{name}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", header=8)
        rows = Dataset.from_dict(
            {"image": images, "label": labels}, features=_features(28, names=CLOTHES)
        )
        write_parquet(rows, destination / f"{split}.parquet")


def build_digits(_parts: Parts, destination: Path) -> None:
    """The 1,797 digits of scikit-learn: columns image (8, 8) uint8 of 0..255, label."""
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # they come as 0..16
    rows = [
        {"image": image.tolist(), "label": int(label), "row": str(number)}
        for number, (image, label) in enumerate(zip(images, digits.target, strict=True))
    ]
    _write(rows, destination, side=8)


def build_mnist(parts: Parts, destination: Path) -> None:
    """10,000 digits of MNIST: columns image (28, 28) uint8, label."""
    rows: list[dict[str, Any]] = []
    for digit in DIGITS:
        path = parts["mnist"] / "package" / "src" / "digits" / f"{digit}.json"
        shades = np.array(json.loads(path.read_text(encoding="utf8"))["data"], dtype=np.float32)
        for image in (shades * 255).round().astype(np.uint8).reshape(-1, 28, 28):
            rows.append({"image": image.tolist(), "label": int(digit), "row": str(len(rows))})
    _write(rows, destination, side=28)


def build_clothes_vit(parts: Parts, destination: Path) -> None:
    """A small ViT (0.8 million parameters), trained here on the pictures of Fashion-MNIST."""
    _build_vit(parts["fashion-mnist"], destination, names=CLOTHES, epochs=3)


def build_digits_vit(parts: Parts, destination: Path) -> None:
    """The same ViT, trained on the digits of MNIST."""
    _build_vit(parts["mnist"], destination, names=DIGITS, epochs=21)


def _build_vit(data: Path, destination: Path, *, names: tuple[str, ...], epochs: int) -> None:
    rows = Dataset.from_parquet(str(data / "train.parquet")).with_format("numpy")
    images = torch.from_numpy(np.stack(rows["image"][:]).astype(np.float32))
    labels = torch.from_numpy(np.asarray(rows["label"][:]))
    torch.manual_seed(0)
    model = ViTForImageClassification(_vit_config(names))
    _train(model, pixels_of(images), labels, epochs=epochs)
    model.eval().save_pretrained(destination)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """(rows, 28, 28) of 0..255 -> (rows, 1, 28, 28) of -1..1, as the model was trained."""
    return ((images / 255 - MEAN) / STD).unsqueeze(1)


def _vit_config(names: tuple[str, ...]) -> ViTConfig:
    return ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )


def _train(model: Any, pixels: torch.Tensor, labels: torch.Tensor, *, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            loss = F.cross_entropy(model(pixels[rows]).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _write(rows: Iterable[Mapping[str, Any]], destination: Path, *, side: int) -> None:
    features = Features(**_features(side, names=DIGITS), row=Value("string"))
    write_split(rows, destination, key="row", features=features)


def _features(side: int, *, names: tuple[str, ...]) -> Features:
    return Features(
        image=Array2D(shape=(side, side), dtype="uint8"), label=ClassLabel(names=list(names))
    )


def _idx(path: Path, *, header: int) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
