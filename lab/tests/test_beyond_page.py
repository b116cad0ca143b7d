"""The page of results beyond the paper says what the records of the runs say."""

import json

import pytest

from lab_scripts import load_script


@pytest.fixture
def beyond(tmp_path, monkeypatch):
    module = load_script("beyond")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def keep(folder, method, seed, wer, ranks):
    record = {
        "metrics": {"eval_wer": wer},
        "evaluations": [{"step": 0, "eval_wer": 40.04}],
        "baselines": {},
        "budget": {"parameters_end": 1000 + seed},
        "ranks": ranks,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{method}-seed{seed}.json").write_text(json.dumps(record))
    rows = [
        {"evaluation": number, "set": "", "row": 0, "written": text, "expected": "hold the line"}
        for number, text in enumerate((f"base of {method}", f"{method} | heard"))
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / f"{method}-seed{seed}.written.jsonl").write_text(lines)


ENCODER, DECODER = "model.encoder.layers.0.fc1", "model.decoder.layers.1.fc1"


def test_the_page_has_the_mean_of_the_seeds_and_what_was_written(beyond, tmp_path):
    for seed, wer in ((1, 20.0), (2, 31.0)):
        keep(tmp_path / "noisy-prompts", "lora", seed, wer, {ENCODER: 4, DECODER: 4})
        keep(tmp_path / "noisy-prompts", "dynlora", seed, wer - 1, {ENCODER: 7, DECODER: seed - 1})
    lines = beyond.page().splitlines()
    assert "| base | 40.0 | 0 |" in lines
    assert "| lora | **25.5** (20.0, 31.0) | 1,002 |" in lines
    assert "| dynlora | **24.5** (19.0, 30.0) | 1,002 |" in lines
    assert "| encoder | 2 | 7.00 | 0 |" in lines
    assert "| decoder | 2 | 0.50 | 1 |" in lines
    assert "|  | hold the line | base of lora | lora / heard | dynlora / heard |" in lines
    assert "| noisy-prompts, two seeds | 1.00 | 1.00 to 1.00 |" in lines
    assert not [line for line in lines if "italian" in line]


def test_ranks_are_compared_between_tasks_of_one_model_only(beyond, tmp_path):
    keep(tmp_path / "italian", "dynlora", 1, 0.0, {ENCODER: 4, DECODER: 0, "a": 2})
    keep(tmp_path / "synopses", "dynlora", 1, 0.0, {ENCODER: 0, DECODER: 4, "a": 2})
    keep(tmp_path / "noisy-prompts", "dynlora", 1, 0.0, {ENCODER: 4})
    lines = beyond._agreement().splitlines()
    assert [line for line in lines if line.startswith("| ") and "correlation" not in line] == [
        "| synopses and italian | -1.00 | -1.00 to -1.00 |"
    ]


def test_a_rank_map_has_a_row_a_kind_and_a_column_a_layer(beyond):
    records = [{"ranks": {ENCODER: 2, DECODER: 0}}, {"ranks": {ENCODER: 5, DECODER: 1}}]
    kinds, columns, values = beyond.rank_map(records)
    assert (kinds, columns) == (["fc1"], ["encoder 0", "decoder 1"])
    assert values == [[3.5, 0.5]]
