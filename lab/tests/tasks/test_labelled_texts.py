"""Labelled texts: reading, refusing, splitting."""

import gzip

import pytest

from dynlora_lab.tasks.labelled_texts import (
    Example,
    LabelledTexts,
    hold_out,
    read_labelled_texts,
    shipped_sample,
)


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
