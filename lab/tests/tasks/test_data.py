"""Rows for a run: files, folders, splits, and what is refused before a model is loaded."""

import json

import pytest

from dynlora_lab.tasks.data import DataSource, need_columns, need_filled, need_texts, read_splits
from dynlora_lab.tasks.typed_fields import RecipeError


def write(path, text):
    path.write_text(text, encoding="utf8")
    return str(path)


def rows(count, start=0):
    return "text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(start, start + count))


def test_one_file_gives_train_and_a_held_out_share_that_no_run_seed_changes(tmp_path):
    source = DataSource(name=write(tmp_path / "all.csv", rows(100)), eval_share=0.2)
    once, again = read_splits(source), read_splits(source)
    assert (len(once.train), len(once.evals[""])) == (80, 20)
    assert once.evals[""]["text"][:] == again.evals[""]["text"][:]
    assert not {*once.train["text"][:]} & {*once.evals[""]["text"][:]}


def test_a_column_split_divides_one_file(tmp_path):
    text = "text,label,split\na,0,train\nb,1,train\nc,0,dev\n"
    splits = read_splits(DataSource(name=write(tmp_path / "all.csv", text)))
    assert splits.train["text"][:] == ["a", "b"]
    assert splits.evals[""]["text"][:] == ["c"]


def test_a_folder_of_files_gives_one_split_a_file_of_any_format(tmp_path):
    write(tmp_path / "train.csv", rows(4))
    write(tmp_path / "matched.jsonl", json.dumps({"text": "m", "label": 0}) + "\n")
    write(tmp_path / "mismatched.tsv", "text\tlabel\nn\t1\n")
    source = DataSource(name=str(tmp_path), evals={"m": "matched", "mm": "mismatched"})
    splits = read_splits(source)
    assert {name: split["text"][:] for name, split in splits.evals.items()} == {
        "m": ["m"],
        "mm": ["n"],
    }


def test_a_part_of_train_can_be_held_out_to_choose_by(tmp_path):
    write(tmp_path / "train.csv", "text,label\n" + "".join(f"t{i},a\n" for i in range(20)))
    write(tmp_path / "test.csv", "text,label\nx,a\n")
    evals = {"validation": "held_out", "test": "test"}
    splits = read_splits(DataSource(name=str(tmp_path), held_out=0.2, evals=evals))
    held_out, train = set(splits.evals["validation"]["text"]), set(splits.train["text"])
    assert (len(held_out), len(train)) == (4, 16)
    assert not held_out & train
    assert splits.evals["test"]["text"][:] == ["x"]
    again = read_splits(DataSource(name=str(tmp_path), held_out=0.2, evals=evals))
    assert set(again.evals["validation"]["text"]) == held_out


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_held_out_share_leaves_something_on_both_sides(share):
    with pytest.raises(ValueError, match=f"held_out={share} must lie between 0 and 1"):
        DataSource(name="d", held_out=share)


def test_rows_can_be_limited(tmp_path):
    name = write(tmp_path / "all.csv", rows(100))
    splits = read_splits(DataSource(name=name, max_train_rows=7, max_eval_rows=3))
    assert (len(splits.train), len(splits.evals[""])) == (7, 3)


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ({}, {"name": "absent.csv"}, "'absent.csv' is not a file"),
        ({}, {}, "holds no file that ends in"),
        (
            {"train.csv": "text\n", "dev.csv": "text\na\n"},
            {},
            "cannot be read: .* Check its format and that it has rows",
        ),
        ({"train.csv": "text\na\n", "dev.csv": "text\na\n"}, {"evals": "test"}, "no split 'test'"),
        ({"train.csv": "text\na\n", "dev.csv": "text\na\n"}, {"train": "tr"}, "no split 'tr'"),
        ({"train.csv": "text\na\n", "train.jsonl": "{}"}, {}, "two files for one split"),
        ({"train.jsonl": "{no json\n"}, {}, "cannot be read"),
    ],
)
def test_unfit_sources_are_refused(tmp_path, files, fields, message):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(RecipeError, match=message):
        read_splits(DataSource(**{"name": str(tmp_path), **fields}))


def test_a_hub_name_without_a_hub_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="neither a file, a folder, nor a data set"):
        read_splits(DataSource(name="no-such/data-set"))


def test_columns_are_checked_in_every_split(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,0\n")
    write(tmp_path / "dev.csv", "words,label\na,0\n")
    splits = read_splits(DataSource(name=str(tmp_path)))
    with pytest.raises(
        RecipeError, match=r"'text' is missing in the evaluation split, found \['wo"
    ):
        need_columns(splits, ["text"], option="options.texts")


def test_empty_and_numeric_text_columns_are_refused(tmp_path):
    write(tmp_path / "train.csv", "text,empty,label\na,,0\nb,,1\n")
    write(tmp_path / "dev.csv", "text,empty,label\na,,0\n")
    splits = read_splits(DataSource(name=str(tmp_path)))
    need_texts(splits, ["text"])
    with pytest.raises(RecipeError, match="every text in column 'empty' of train is empty"):
        need_texts(splits, ["empty"])
    with pytest.raises(RecipeError, match="holds int values such as 0, not texts"):
        need_texts(splits, ["label"])


CELLS = [f'"text {i},\nsecond line",{i % 2}' for i in range(30)]


def test_a_blank_cell_is_named_by_its_line_whatever_the_shuffle(tmp_path):
    cells = [*CELLS[:11], "blank,", *CELLS[11:]]
    name = write(tmp_path / "rows.csv", "\n".join(["text,label", "", *cells]) + "\n")
    for share in (0.15, 0.9):  # once in train, once in the evaluation split
        splits = read_splits(DataSource(name=name, eval_share=share))
        assert "__row__" not in splits.train.column_names
        # the header, an empty line, eleven rows of two lines
        with pytest.raises(
            RecipeError, match=r"line 25 of rows\.csv has nothing in column 'label'"
        ):
            need_filled(splits, ["label"])


@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n{"text": null}\n{"text": "c"}\n', "line 3 of rows.jsonl"),
        ("rows.json", '[{"text": "a"}, {"text": ""}, {"text": "c"}]', "row 2 of rows.json"),
        ("rows.tsv", "text\tlabel\na\t1\n\t1\nc\t1\n", "line 3 of rows.tsv"),
    ],
)
def test_each_format_names_a_row_as_an_editor_finds_it(tmp_path, file, text, place):
    splits = read_splits(DataSource(name=write(tmp_path / file, text)))
    with pytest.raises(RecipeError, match=f"{place} has nothing in column 'text'"):
        need_filled(splits, ["text"])


def test_a_row_of_a_folder_is_named_by_its_file(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,1\n")
    write(tmp_path / "validation.csv", "text,label\na,1\nb,\n")
    with pytest.raises(RecipeError, match=r"line 3 of validation\.csv"):
        need_filled(read_splits(DataSource(name=str(tmp_path))), ["label"])


def test_blank_texts_are_counted_and_the_first_is_named(tmp_path):
    write(tmp_path / "train.csv", 'text,label\na,1\n,0\n"  ",1\n')
    write(tmp_path / "test.csv", "text,label\nx,1\n")
    splits = read_splits(DataSource(name=str(tmp_path)))
    (note,) = need_texts(splits, ["text"])
    assert note.startswith(
        "2 of 3 texts in column 'text' of train are blank and are used as they are"
    )
    assert "line 3 of train.csv" in note
