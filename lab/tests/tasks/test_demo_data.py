"""The sample of WordNet glosses in the package, and the script that draws it."""

import csv
import gzip
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from lab_scripts import load_script

SAMPLE = Path(str(files("dynlora_lab.data") / "wordnet_glosses.csv.gz"))


@pytest.fixture(scope="module")
def rows():
    with gzip.open(SAMPLE, "rt", encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def script():
    return load_script("make_wordnet_sample")


def test_sample_is_small_and_has_the_promised_rows(rows):
    assert SAMPLE.stat().st_size < 400_000
    assert Counter(row["split"] for row in rows) == {"train": 8000, "test": 1000}


def test_no_text_occurs_twice_whatever_its_case(rows):
    assert len({row["text"].lower() for row in rows}) == len(rows)


def test_every_class_is_in_both_splits_with_its_natural_share(rows):
    train, test = (
        Counter(row["label"] for row in rows if row["split"] == s) for s in ("train", "test")
    )
    assert len(train) == 26
    assert train.keys() == test.keys()
    assert all(label.startswith("noun.") for label in train)
    assert all(abs(train[label] / 8 - test[label]) <= 2.5 for label in train)


def test_texts_are_definitions_without_usage_examples(rows):
    assert all(len(row["text"].split()) >= 3 for row in rows)
    assert not any('"' in row["text"] for row in rows)


def test_gzip_header_holds_no_time():
    assert SAMPLE.read_bytes()[4:8] == bytes(4)


def test_licence_of_the_texts_is_beside_them():
    licence = SAMPLE.with_name("WORDNET_LICENSE.txt").read_text(encoding="utf8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University." in licence
    assert "THIS SOFTWARE AND DATABASE IS PROVIDED" in licence


@pytest.mark.parametrize(
    ("gloss", "expected"),
    [
        ('a living being; "it was alive"; "two of them"', "a living being"),
        ("a city in Ohio; on the river  \n", "a city in Ohio; on the river"),
        ('a colour: "a red rose"', "a colour"),
    ],
)
def test_definition_drops_what_is_quoted(script, gloss, expected):
    assert script.definition(gloss) == expected


def test_counts_are_proportional_and_spend_every_row(script):
    counts = script.stratified_counts({"a": 700, "b": 290, "c": 10}, 50, least=2)
    assert counts == {"a": 34, "b": 14, "c": 2}
    assert script.stratified_counts({"a": 5, "b": 4}, 4, least=1) == {"a": 2, "b": 2}


def test_drawing_does_not_depend_on_the_order_of_the_rows(script):
    rows = [(f"text number {i}", f"label {i % 3}") for i in range(60)]
    assert script.draw(rows) == script.draw(rows[::-1])


def test_database_lines_with_two_labels_or_too_few_words_are_left_out(script, tmp_path):
    lines = [
        "  1 licence text",
        "0001 05 n 01 cat 0 000 | a small furry animal",
        "0002 05 n 01 dog 0 000 | another one, less small",
        "0003 06 n 01 cup 0 000 | Another one, less small",
        "0004 06 n 01 pot 0 000 | two words",
    ]
    database = tmp_path / "data.noun"
    database.write_text("\n".join(lines) + "\n", encoding="utf8")
    assert script.labelled_definitions(database) == [("a small furry animal", "noun.animal")]
