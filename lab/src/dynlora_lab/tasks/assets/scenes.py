"""Pictures with questions: up to four clothes or digits in the corners of 28 x 28 pixels."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, Features, Sequence, Value
from numpy.typing import NDArray

from dynlora_lab.tasks.assets.pictures import CLOTHES
from dynlora_lab.tasks.assets.tables import write_parts

Parts = Mapping[str, Path]

CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = {"train": 12_000, "validation": 2_000}
HALF = 14  # pixels of a corner


def build_clothes_scenes(parts: Parts, destination: Path) -> None:
    """Columns image (28, 28), question, answer, kind, corners, of the pictures of Fashion-MNIST.

    Every tenth question has an empty picture and is about the row of numbers, so that a model that
    reads nothing else knows the words.
    """
    _build(parts["fashion-mnist"], destination, names=CLOTHES, counting=0.1)


def build_digit_scenes(parts: Parts, destination: Path) -> None:
    """Columns image (28, 28), question, answer, kind, corners, of the digits of MNIST."""
    _build(parts["mnist"], destination, names=NUMBERS, counting=0.0)


def _build(data: Path, destination: Path, *, names: tuple[str, ...], counting: float) -> None:
    chance = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, number in ROWS.items():
        pictures = Dataset.from_parquet(str(data / f"{split}.parquet")).with_format("numpy")
        small = _halved(np.stack(pictures["image"][:]))
        labels = [int(label) for label in pictures["label"][:]]
        made = _questions(small, labels, names, chance, number=number, counting=counting)
        rows[split] = list(made)
    features = Features(
        image=Array2D(shape=(2 * HALF, 2 * HALF), dtype="uint8"),
        question=Value("string"),
        answer=Value("string"),
        kind=ClassLabel(names=["what", "which", "count", "next"]),
        corners=Sequence(Value("int8"), length=4),  # class in each corner, -1: nothing
    )
    write_parts(rows, destination, features=features)


def _questions(
    pictures: NDArray[np.uint8],
    labels: list[int],
    names: tuple[str, ...],
    chance: np.random.Generator,
    *,
    number: int,
    counting: float,
) -> Iterator[dict[str, Any]]:
    for _ in range(number):
        if chance.random() < counting:
            yield _next_number(chance)
            continue
        things = int(chance.integers(1, 5))
        corners = chance.permutation(4)[:things]
        chosen = chance.integers(len(pictures), size=things)
        image = np.zeros((2 * HALF, 2 * HALF), dtype=np.uint8)
        for corner, thing in zip(corners, chosen, strict=True):
            row, column = HALF * (corner // 2), HALF * (corner % 2)
            image[row : row + HALF, column : column + HALF] = pictures[thing]
        found = [-1] * 4
        for corner, thing in zip(corners, chosen, strict=True):
            found[corner] = labels[thing]
        seen = {CORNERS[corner]: names[found[corner]] for corner in corners}
        question, answer, kind = _asked(seen, chance)
        yield _row(image, question, answer, kind, found)


def _asked(seen: Mapping[str, str], chance: np.random.Generator) -> tuple[str, str, str]:
    """A question about what is seen in the corners: (question, answer, kind)."""
    kind = ("what", "what", "which", "count")[chance.integers(4)]
    corner = str(chance.choice(list(seen)))
    if kind == "count":
        return "how many things are there ?", NUMBERS[len(seen)], "count"
    if kind == "which" and list(seen.values()).count(seen[corner]) == 1:
        return f"where is the {seen[corner]} ?", corner, "which"
    return f"what is at the {corner} ?", seen[corner], "what"


def _next_number(chance: np.random.Generator) -> dict[str, Any]:
    first = int(chance.integers(9))
    image = np.zeros((2 * HALF, 2 * HALF), dtype=np.uint8)
    question = f"what comes after {NUMBERS[first]} ?"
    return _row(image, question, NUMBERS[first + 1], "next", [-1] * 4)


def _row(
    image: NDArray[np.uint8], question: str, answer: str, kind: str, corners: list[int]
) -> dict[str, Any]:
    texts = {"question": question, "answer": answer, "kind": kind}
    return {"image": image, **texts, "corners": corners}


def _halved(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, 28, 28) -> (rows, 14, 14), the means of squares of two pixels."""
    squares = pictures.reshape(len(pictures), HALF, 2, HALF, 2).astype(np.float32)
    return squares.mean(axis=(2, 4)).round().astype(np.uint8)
