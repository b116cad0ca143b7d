"""The table of cuts says what the cuts of a suite's cells say."""

import pytest

from dynlora_lab.bench.suite import suite_from
from lab_scripts import load_script


@pytest.fixture(scope="module")
def table():
    return load_script("cuts_table")


def cut(order, rank, score, loss):
    return {
        "order": order, "rank": rank, "parameters": 10 * rank, "selected": score, "reported": score,
        "selected_loss": loss, "reported_loss": loss,
    }  # fmt: skip


def run(seed, *, better_by=0.0):
    """A run whose curvature is better by so much at rank 2; its loss is 1 whole and 2 without."""
    curves = {
        "singular values": [(4, 0.90, 1.0), (2, 0.80, 1.02), (0, 0.5, 2.0)],
        "curvature": [(4, 0.90, 1.0), (2, 0.80 + better_by, 1.002), (0, 0.5, 2.0)],
    }
    cuts = [cut(order, *point) for order, points in curves.items() for point in points]
    return {
        "status": "done", "is_better_higher": True, "reported": {"final": 0.9}, "cuts": cuts,
        "budget": {"parameters_start": 80}, "cell": {"task": "words", "seed": seed},
    }  # fmt: skip


@pytest.fixture
def suite():
    return suite_from(
        {
            "name": "cuts", "baseline": "cuts", "learning_rates": [0.1], "seeds": [1, 2, 3],
            "tune_seeds": [1], "tasks": {"words": {"data": {"name": "offline:trec"}}},
            "methods": {"cuts": {"method": "lora-cuts"}},
            "defaults": {"task": "text-classification", "model": "offline:all-MiniLM-L6-v2"},
        }
    )  # fmt: skip


def lines_of(table, suite, *runs):
    return table.page(table.Cuts(suite, {str(i): one for i, one in enumerate(runs)})).splitlines()


def test_scores_are_those_of_the_cut_minus_the_whole(table, suite):
    lines = lines_of(table, suite, run(1), run(2), run(3))
    assert "| rank 4 | curvature | +0.00 | +0.00 [+0.00, +0.00] | 0.50 |" in lines
    assert "| rank 2 | singular values | -10.00 | -10.00 [-10.00, -10.00] | 0.25 |" in lines
    assert "| rank 2 | +0.00 [+0.00, +0.00] |" in lines


def test_curvature_is_compared_with_singular_values_at_each_size(table, suite):
    lines = lines_of(table, suite, *(run(seed, better_by=0.05) for seed in (1, 2, 3)))
    assert "| rank 2 | +5.00 [+5.00, +5.00] |" in lines


def test_a_tolerance_takes_the_smallest_cut_whose_selecting_loss_is_within_it(table, suite):
    lines = lines_of(table, suite, *(run(seed, better_by=0.05) for seed in (1, 2, 3)))
    assert "| 0.3% | singular values | +0.00 | +0.00 [+0.00, +0.00] | 0.50 |" in lines
    assert "| 0.3% | curvature | -5.00 | -5.00 [-5.00, -5.00] | 0.25 |" in lines
    best = table.EITHER
    assert f"| 0.3% | {best} | -5.00 | -5.00 [-5.00, -5.00] | 0.25 |" in lines
    assert "| 3.0% | singular values | -10.00 | -10.00 [-10.00, -10.00] | 0.25 |" in lines
