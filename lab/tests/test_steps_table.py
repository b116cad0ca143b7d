"""The table of steps until a score says what the curves of a suite say."""

import pytest

from dynlora_lab.bench.suite import suite_from
from lab_scripts import load_script


@pytest.fixture(scope="module")
def table():
    return load_script("steps_table")


def run(method, seed, scores, *, is_better_higher=True):
    curve = [{"step": 10 * (i + 1), "reported": score} for i, score in enumerate(scores)]
    return {
        "status": "done",
        "is_better_higher": is_better_higher,
        "curve": curve,
        "cell": {"task": "words", "method": method, "seed": seed},
    }


@pytest.fixture
def suite():
    return suite_from(
        {
            "name": "steps",
            "baseline": "lora-r16",
            "learning_rates": [0.1],
            "seeds": [1, 2, 3],
            "tune_seeds": [1],
            "tasks": {"words": {"data": {"name": "offline:trec"}}},
            "methods": {"lora-r16": {"method": "lora"}, "auto": {"method": "dynlora-auto"}},
            "defaults": {"task": "text-classification", "model": "offline:all-MiniLM-L6-v2"},
        }
    )


def results(*runs):
    return {str(i): one for i, one in enumerate(runs)}


def test_the_score_is_what_every_method_ends_with_and_the_first_test_that_has_it_counts(
    table, suite
):
    found = results(
        run("lora-r16", 1, [0.5, 0.7, 0.9]),
        run("lora-r16", 2, [0.7, 0.6, 0.9]),
        run("lora-r16", 3, [0.5, 0.6, 0.9]),
        run("auto", 1, [0.5, 0.6, 0.7]),
        run("auto", 2, [0.5, 0.75, 0.7]),
        run("auto", 3, [0.5, 0.6, 0.7]),
    )
    lines = table.page(suite, found).splitlines()
    assert lines[-3:] == [
        "|---|---|---|",
        "| lora-r16 | 20; 90.00 | 1.00 |",
        "| auto | 30; 70.00 | 1.50 |",
    ]
    assert "words (70.00)" in lines[-4]


def test_runs_that_never_have_it_count_as_the_latest(table, suite):
    found = results(
        run("lora-r16", 1, [0.9, 0.9]),
        run("lora-r16", 2, [0.9, 0.9]),
        run("auto", 1, [0.1, 0.1]),
        run("auto", 2, [0.1, 0.1]),
        run("auto", 3, [0.2, 0.7]),
    )
    assert table.page(suite, found).splitlines()[-1] == "| auto | -, 2 never; 30.00 | - |"


def test_where_lower_is_better_the_first_that_is_low_enough_counts(table, suite):
    found = results(
        run("lora-r16", 1, [9.0, 5.0], is_better_higher=False),
        run("auto", 1, [6.0, 6.0], is_better_higher=False),
    )
    curve = table.curves(suite, found)["words", "lora-r16"][0]
    assert table.steps_until(curve, -600.0) == 20
