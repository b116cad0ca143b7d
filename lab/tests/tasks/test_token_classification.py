"""Tagging words: whole runs on tiny models, and what is refused."""

import pytest
from datasets import ClassLabel, Features, Sequence, Value
from transformers import DistilBertConfig, DistilBertForTokenClassification

from dynlora_lab.tasks.token_classification import Options, read
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, save_model, splits_of, tiny_tokenizer

PEOPLE, PLACES = ("anna", "bruno", "clara", "dora"), ("rome", "oslo", "paris")
ROWS = [
    {
        "tokens": [person.title(), "went", "to", "new", place.title(), "today"],
        "ner_tags": ["B-person", "O", "O", "B-place", "I-place", "O"],
    }
    for person in PEOPLE
    for place in PLACES
]


@pytest.fixture
def model(tmp_path):
    tokenizer = tiny_tokenizer([" ".join(row["tokens"]) for row in ROWS])
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=2, num_labels=3
    )
    return save_model(tmp_path / "base", DistilBertForTokenClassification(config), tokenizer)


def test_a_run_learns_to_tag_and_leaves_its_record(tmp_path, model):
    result = run_rows(
        tmp_path,
        splits_of(ROWS),
        task="token-classification",
        model=model,
        training={"num_train_epochs": 20},
    )
    record = result.record
    assert record["baselines"]["f1"] == 0.0
    assert record["metrics"]["eval_f1"] > 0.9
    assert record["data"]["labels"] == ["O", "B-person", "B-place", "I-place"]


def test_words_that_were_cut_off_count_as_missed(tmp_path, model):
    cut = run_rows(
        tmp_path,
        splits_of(ROWS),
        task="token-classification",
        model=model,
        options={"max_length": 4},
        training={"num_train_epochs": 20},
    )
    metrics = cut.record["metrics"]
    assert metrics["eval_recall"] <= 0.5  # every sentence has its place behind the cut
    assert metrics["eval_tag_accuracy"] < 1.0


def test_class_numbers_keep_the_names_of_the_data():
    features = Features(
        tokens=Sequence(Value("string")), ner_tags=Sequence(ClassLabel(names=["O", "B-x"]))
    )
    rows = [{"tokens": ["a", "b"], "ner_tags": [0, 1]}]
    data = read(Options(), splits_of(rows, features=features))
    assert data.labels == ["O", "B-x"]
    assert data.train["tags"][0] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ner_tags": ["O"]}, "row 0 of train has 1 tags in 'ner_tags'"),
        ({"tokens": None}, "row 0 of train has 6 tags"),
    ],
)
def test_rows_without_a_tag_for_each_word_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        read(Options(), splits_of([{**ROWS[0], **change}, ROWS[1]], ROWS))


def test_a_tag_that_training_never_shows_is_refused():
    odd = [{**ROWS[0], "ner_tags": ["B-planet", "O", "O", "O", "O", "O"]}]
    with pytest.raises(RecipeError, match="tag 'B-planet' occurs in .* but not in train"):
        read(Options(), splits_of(ROWS, odd))
