"""The table of score against size says what the cells of a suite say."""

import json

import pytest

from dynlora_lab.bench.results import SUITE_FILE, read_results, read_suite_file
from dynlora_lab.bench.suite import suite_from
from lab_scripts import load_script

METHODS = {"lora-r8": 800, "lora-r2": 200, "auto": 400}


@pytest.fixture
def table():
    return load_script("size_table")


@pytest.fixture
def folder(tmp_path):
    """One task, two rates of which 0.2 is better, seed 0 for the rates and 1, 2 for the scores."""
    suite = suite_from(
        {
            "name": "sizes",
            "baseline": "lora-r8",
            "learning_rates": [0.1, 0.2],
            "seeds": [1, 2],
            "tune_seeds": [0],
            "tasks": {"words": {"data": {"name": "offline:trec"}}},
            "methods": {name: {"method": "lora"} for name in METHODS},
            "defaults": {"task": "text-classification", "model": "offline:all-MiniLM-L6-v2"},
        }
    )
    (tmp_path / SUITE_FILE).write_text(json.dumps({"format": 1, **suite.to_dict()}))
    (tmp_path / "cells").mkdir()
    for name, size in METHODS.items():
        for seed, rate in ((0, 0.1), (0, 0.2), (1, 0.2), (2, 0.2)):
            score = 0.01 * seed + rate + {"lora-r8": 0.5, "lora-r2": 0.3, "auto": 0.44}[name]
            cell = {"task": "words", "method": name, "learning_rate": rate, "seed": seed}
            result = {
                "format": 1, "status": "done", "cell": cell, "metric": "accuracy", "is_better_higher": True,
                "selected": {"final": score, "best": None}, "reported": {"final": score, "best": None},
                "budget": {"parameters_end": size}, "cpu_s": size / 100,
            }  # fmt: skip
            (tmp_path / "cells" / f"words--{name}--lr{rate}--seed{seed}.json").write_text(
                json.dumps(result)
            )
    return tmp_path


def test_scores_sizes_and_costs_are_those_of_the_chosen_rate_and_the_reported_seeds(table, folder):
    sizes = table.Sizes(read_suite_file(folder), read_results(folder))
    assert sizes.seeds == [1, 2]
    assert sizes.rates["auto", "words"] == 0.2
    assert sizes.share("auto") == 0.5
    assert sizes.scores("auto", "words") == pytest.approx([65.0, 66.0])
    text = table.page(sizes)
    assert "| auto | 65.50 ± 0.71 | 65.50 | -6.00 [-6.00, -6.00] | 0.50 | 4 |" in text
    assert "(lora-r2, lora-r8): auto 0.40." in text


def test_a_run_is_compared_with_the_loras_around_its_size_on_a_logarithmic_scale(table, folder):
    sizes = table.Sizes(read_suite_file(folder), read_results(folder))
    (differences,) = sizes.against_own_size("auto", is_tuned=True)
    assert differences == pytest.approx([4.0, 4.0])  # 400 is half-way from 200 to 800: 60 at 0.5
    assert sizes.against_own_size("auto", is_tuned=False) is not None


def test_the_picture_is_drawn(table, folder):
    table.picture(table.Sizes(read_suite_file(folder), read_results(folder)), folder / "sizes.png")
    assert (folder / "sizes.png").read_bytes().startswith(b"\x89PNG")
