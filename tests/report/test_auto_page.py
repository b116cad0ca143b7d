"""The report of a run that found its size answers "which rank?"."""

import json

import pytest

pytest.importorskip("matplotlib")

from dynlora.report.charts import run_charts
from dynlora.report.conclusion import conclusion
from dynlora.report.page import write_page
from dynlora.report.run import read_run, read_runs

FOUND = {
    "order": "energy", "without": 6.0, "whole": 2.1, "reference": 2.0, "limit": 2.04, "budget": 30,
    "tried": [[25, 2.3], [30, 2.03]], "by_rank": [[1, 20, 3.0], [2, 40, 2.012]],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    start = {
        "event": "start", "step": 0, "time": 0.0, "total_steps": 10, "window": [0, 7],
        "importance": "sensitivity", "budget": "parameters", "schedule": [[7, 80]],
        "total_cost": 80, "target_cost": 80, "ranks": {"a": 4, "b": 4},
        "component_sizes": {"a": 8, "b": 12},
    }  # fmt: skip
    prune = {
        "event": "prune", "step": 7, "time": 1.0, "cost": 28, "live": 5, "cut": 3, "revived": 0,
        "ranks": {"a": 1, "b": 4}, "importance_kept": [1, 1, 1, 1, 1],
        "importance_cut": [0, 0, 0, 0, 0], "auto": FOUND,
    }  # fmt: skip
    end = {"event": "end", "step": 10, "time": 2.0, "ranks": {"a": 1, "b": 4}, "is_frozen": True}
    lines = [json.dumps(event) for event in (start, prune, end)]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_the_sentence_on_top_says_what_fixed_ranks_would_have_cost(folder):
    text = conclusion(read_run(folder))
    assert "The size of rank 1 would have lost 25 % of the gain, that of rank 2 0.3 %" in text


def test_the_curve_says_which_point_was_chosen(folder):
    chart = run_charts(read_run(folder))[0]
    assert chart.title.startswith("Held-out loss against size")
    assert (
        "30 parameters were chosen, with a loss of 2.03 against 2.1 of the whole" in chart.summary
    )
    assert "accepted" in chart.svg


def test_the_page_has_a_row_for_each_rank(folder, tmp_path):
    page = write_page(read_runs([folder]), tmp_path / "page.html", version="0").read_text("utf-8")
    assert "Which rank?" in page
    assert "25 %" in page


def test_a_record_of_the_first_version_which_knew_of_no_gain_is_passed_over(folder):
    known = ("order", "reference", "limit", "budget", "tried", "by_rank")
    path = folder / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[1]["auto"] = {name: FOUND[name] for name in known}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert "rank 1" not in conclusion(read_run(folder))
