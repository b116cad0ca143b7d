"""Labelled texts: reading, refusing, splitting; tokenising; head; accuracy."""

import gzip

import numpy as np
import pytest
from transformers import DistilBertConfig, DistilBertModel, EvalPrediction

from dynlora.tasks.labelled_texts import (
    Example,
    LabelledTexts,
    accuracy,
    hold_out,
    majority_share,
    read_labelled_texts,
    sequence_classifier,
    shipped_sample,
    tokenised,
)
from tiny_classifier import save_encoder, tiny_tokenizer


def csv_file(tmp_path, content, name="texts.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def examples(**count_of_label):
    return [
        Example(text=f"{label} {i}", label=label)
        for label, count in count_of_label.items()
        for i in range(count)
    ]


def test_shipped_sample_reads():
    texts = shipped_sample()
    assert (len(texts.train), len(texts.test), len(texts.labels)) == (8000, 1000, 26)
    assert majority_share(texts) == 0.144


def test_split_column_is_followed(tmp_path):
    content = 'text,label,split\n"a, b",x,train\nc,y,train\nd,x,test\n'
    texts = read_labelled_texts(csv_file(tmp_path, content))
    assert texts == LabelledTexts(
        labels=("x", "y"),
        train=(
            Example(text="a, b", label="x", split="train"),
            Example(text="c", label="y", split="train"),
        ),
        test=(Example(text="d", label="x", split="test"),),
    )


def test_gzip_bom_and_further_columns_are_fine(tmp_path):
    content = gzip.compress("\ufefflabel,id,text\nx,1,a\nx,2,b\ny,3,c\ny,4,d\n".encode())
    texts = read_labelled_texts(csv_file(tmp_path, content, "texts.csv.gz"))
    assert texts.labels == ("x", "y")
    assert len(texts.train) == len(texts.test) == 2


def test_hold_out_takes_15_percent_of_each_label():
    split = hold_out(examples(x=100, y=20, z=2, single=1))
    held_out = [e.label for e in split if e.split == "test"]
    assert {label: held_out.count(label) for label in "xyz"} == {"x": 15, "y": 3, "z": 1}
    assert "single" not in held_out
    assert len(split) == 123


def test_hold_out_depends_on_texts_alone_and_keeps_equal_texts_together():
    rows = examples(x=40, y=40) * 2
    split = hold_out(rows)
    assert {(e.text, e.split) for e in split} == {(e.text, e.split) for e in hold_out(rows[::-1])}
    assert not {e.text for e in split if e.split == "train"} & {
        e.text for e in split if e.split == "test"
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words,label\na,x\n", r"column 'text' is missing, found \['words', 'label'\]"),
        ("text\tlabel\na\tx\n", r"column 'text' is missing, .* separated by commas"),
        ("", r"column 'text' is missing, found \[\]"),
        ("text,label\na,x\n ,y\n", r"line 3: column 'text' is empty; fill it or delete the row"),
        ("text,label\na\n", r"line 2: column 'label' is empty"),
        ("text,label\na, b,x\n", r"line 2 has more cells .* double quotes"),
        ("text,label\na,x\nb,x\n", r"holds 1 class\(es\) to train on; give at least 2"),
        ("text,label\n", r"holds 0 class\(es\)"),
        ("text,label,split\na,x,dev\n", r"line 2: column 'split' is 'dev'; write 'train' or"),
        ("text,label,split\na,x,train\nb,y,test\n", r"label 'y' occurs only in the split 'test'"),
        ("text,label\na,x\nb,y\n", r"no rows are held out for testing"),
        (b"text,label\n\xff\xfe,x\n", r"is not UTF-8 text"),
    ],
)
def test_unfit_files_are_refused_with_place_and_way_out(tmp_path, content, message):
    path = csv_file(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled_texts(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_false_gzip_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file; give a CSV file with the columns text"):
        read_labelled_texts(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="cannot be read as CSV: Not a gzipped file"):
        read_labelled_texts(csv_file(tmp_path, "text,label\n", "plain.csv.gz"))


def test_majority_is_that_of_the_training_rows():
    train = (*examples(x=3, y=2),)
    assert majority_share(LabelledTexts(labels=("x", "y"), train=train, test=train[2:])) == 1 / 3


def test_tokens_are_unpadded_cut_and_numbered():
    rows = [Example(text="good film", label="pos"), Example(text="bad " * 99, label="neg")]
    tokens = tokenised(rows, labels=("neg", "pos"), tokenizer=tiny_tokenizer())
    assert tokens[0]["input_ids"] == [2, 4, 9, 3]
    assert len(tokens[1]["input_ids"]) == 32
    assert tokens["labels"] == [1, 0]


def test_accuracy_is_the_share_of_right_answers():
    logits = np.array([[0.1, 0.9], [2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    prediction = EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0, 0]))
    assert accuracy(prediction) == {"accuracy": 0.75}


def test_classifier_names_its_labels_and_its_new_modules(tmp_path):
    folder = save_encoder(tmp_path)
    model, new = sequence_classifier(folder, labels=("a", "b", "c"), tokenizer=tiny_tokenizer())
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.classifier.out_features == 3
    assert new == ["classifier"]


def test_all_new_modules_of_a_head_are_found(tmp_path):
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
    folder = save_encoder(tmp_path, DistilBertConfig, DistilBertModel, **sizes)
    _, new = sequence_classifier(folder, labels=("a", "b"), tokenizer=tiny_tokenizer())
    assert new == ["classifier", "pre_classifier"]


def test_a_head_for_other_labels_counts_as_new(tmp_path):
    folder, tokenizer = save_encoder(tmp_path / "encoder"), tiny_tokenizer()
    model, _ = sequence_classifier(folder, labels=("a", "b"), tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "trained")
    same, three = (("a", "b"), ("a", "b", "c"))
    trained = str(tmp_path / "trained")
    assert sequence_classifier(trained, labels=same, tokenizer=tokenizer)[1] == []
    assert sequence_classifier(trained, labels=three, tokenizer=tokenizer)[1] == ["classifier"]
