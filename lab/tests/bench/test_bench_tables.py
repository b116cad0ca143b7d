"""Tables from results files: the numbers in them, and that nothing else decides them."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from bench_results import cell, failed, finished, result, score, small_suite
from dynlora_lab.bench.render import TABLES, render, rendered
from dynlora_lab.bench.results import open_folder, write_result
from dynlora_lab.bench.summary import summarise
from dynlora_lab.tasks.typed_fields import RecipeError

COMMITTED = sorted((Path(__file__).parents[2] / "results").glob("*/suite.json"))


def row(summary, task, method):
    return next(r for r in summary["rows"] if (r["task"], r["method"]) == (task, method))


def test_a_row_holds_the_seeds_at_the_chosen_rate(tmp_path):
    found = row(summarise(finished(tmp_path)), "a", "dynlora")
    assert found["learning_rate"] == 0.01
    assert found["seeds"] == [0, 1, 2]
    assert found["final"] == pytest.approx(85.0)  # reported: 84, 85, 86
    assert found["final_std"] == pytest.approx(1.0)
    assert found["best"] == pytest.approx(86.0)
    assert found["cost"]["train_s"] == pytest.approx(11.0)
    assert found["cost"]["peak_mib"] == 1024
    assert found["published"] == 90.5


def test_forgetting_is_a_column_where_cells_measured_it(tmp_path):
    def forgetful(c):
        known = {"before": 2.0, "after": 2.1 + 0.1 * c.seed, "tokens": 60}
        return result(c, score(c)) | ({"forgetting": known} if c.method == "lora" else {})

    summary = summarise(finished(tmp_path, run=forgetful))
    assert row(summary, "a", "lora")["forgetting"] == pytest.approx(0.2)
    files = rendered(tmp_path)
    lines = [line for line in files["README.md"].splitlines() if line.startswith("| a | ")]
    assert "| a | lora | 300 | 200 | 11 | 1,024 | +0.200 |" in lines
    assert "| a | dynlora | 300 | 200 | 11 | 1,024 | - |" in lines
    assert "nats a token" in files["index.html"]
    table = list(csv.DictReader(io.StringIO(files["table.csv"])))
    assert table[0]["forgetting"] == "0.2"


def test_no_table_speaks_of_forgetting_that_no_cell_measured(tmp_path):
    files = rendered(finished(tmp_path))
    assert [name for name, text in files.items() if "forgetting" in text.lower()] == []


def test_differences_are_paired_by_seed(tmp_path):
    def uneven(c):
        return result(c, score(c), reported=score(c) + 0.03 * (c.method == "lora") * c.seed)

    found = row(summarise(finished(tmp_path, run=uneven)), "a", "dynlora")["difference"]
    assert found["mean"] == pytest.approx(100 * (0.05 + 0.02 - 0.01) / 3)
    assert (found["wins"], found["losses"]) == (2, 1)


def test_each_method_is_compared_with_each_other_in_both_directions(tmp_path):
    summary = summarise(finished(tmp_path))
    found = {(d["method"], d["against"]): d["difference"] for d in summary["duels"]}
    assert set(found) == {("lora", "dynlora"), ("dynlora", "lora")}
    forth, back = found["dynlora", "lora"], found["lora", "dynlora"]
    assert forth["mean"] == pytest.approx(-back["mean"])
    overall = {entry["method"]: entry["difference"] for entry in summary["overall"]}
    assert forth == overall["dynlora"]
    text = rendered(tmp_path)["README.md"]
    assert f"| lora | - | {back['mean']:+.2f} [" in text


def test_a_difference_is_positive_where_the_method_is_better_though_lower(tmp_path):
    folder = finished(tmp_path, run=lambda c: result(c, score(c), is_better_higher=False))
    summary = summarise(folder)
    mine, base = row(summary, "a", "dynlora"), row(summary, "a", "lora")
    assert mine["final"] < base["final"]
    assert mine["difference"]["mean"] == pytest.approx(base["final"] - mine["final"])
    assert next(iter(summary["ranking"]["mean_rank"])) == "dynlora"


def test_the_tables_say_what_is_missing_and_what_failed(tmp_path):
    suite = small_suite()
    open_folder(tmp_path, suite)
    bad = cell("a", "lora", 0.01, 0)
    write_result(tmp_path, bad.key, failed(bad))
    good = cell("a", "lora", 0.001, 0)
    write_result(tmp_path, good.key, result(good, 0.7))
    text = rendered(tmp_path)["README.md"]
    assert "1 of 16 cells are done: **the suite is not complete**" in text
    assert f"1 failed (`{bad.key}`: FloatingPointError: NaN)" in text
    assert "| lora | 69.00 (1) | - | - |" in text


def test_cells_that_the_suite_does_not_want_are_not_counted(tmp_path):
    finished(tmp_path)
    before = rendered(tmp_path)
    stray = cell("a", "lora", 0.001, 2)
    write_result(tmp_path, stray.key, result(stray, 0.1))
    assert rendered(tmp_path) == before


def test_cells_of_two_bases_never_share_a_table(tmp_path):
    def run(c):
        return result(c, score(c)) | {"base_sha256": ["a" if c.task == "a" else "b"]}

    assert summarise(finished(tmp_path, run=run))["cells"]["failed"] == 0
    other = cell("a", "lora", 0.01, 1)
    write_result(tmp_path, other.key, result(other, 0.1) | {"base_sha256": ["b"]})
    with pytest.raises(RecipeError, match=f"and '{other.key}' started from base models with diff"):
        summarise(tmp_path)


def test_the_tables_say_at_which_ranks_modules_end(tmp_path):
    def ragged(c):
        ranks = {"lora": {"q": 2, "k": 2}, "dynlora": {"q": 3, "k": 1 - (c.seed == 0)}}
        return result(c, score(c)) | {"ranks": ranks[c.method]}

    text = rendered(finished(tmp_path, run=ragged))["README.md"]
    assert "| lora | 2: 2 | 2: 2 |" in text
    assert "| dynlora | 0: 0.3, 1: 0.7, 3: 1 | 0: 0.3, 1: 0.7, 3: 1 |" in text


def test_without_evaluations_on_the_way_there_is_no_best_epoch_to_show(tmp_path):
    def only_final(c):
        found = result(c, score(c))
        return found | {k: found[k] | {"best": None} for k in ("selected", "reported")}

    tables = rendered(finished(tmp_path / "with"))
    assert "## The best epoch" in tables["README.md"]
    assert "<h2>The best epoch" in tables["index.html"]
    tables = rendered(finished(tmp_path / "without", run=only_final))
    assert "## The best epoch" not in tables["README.md"]
    assert "<h2>The best epoch" not in tables["index.html"]


def test_all_formats_show_the_same_score(tmp_path):
    finished(tmp_path)
    tables = rendered(tmp_path)
    assert set(tables) == set(TABLES)
    assert "| dynlora | 85.00 ± 1.00 | 75.00 ± 1.00 | 80.00 |" in tables["README.md"]
    assert "| dynlora, published | 90.50 | - | - |" in tables["README.md"]
    assert r"dynlora & 85.00 $\pm$ 1.00 & 75.00 $\pm$ 1.00 & 80.00 \\" in tables["table.tex"]
    assert "<td>85.00 ± 1.00</td>" in tables["index.html"]
    lines = list(csv.DictReader(io.StringIO(tables["table.csv"])))
    assert [(r["task"], r["method"], r["final"]) for r in lines][1] == ("a", "dynlora", "85")
    assert row(json.loads(tables["summary.json"]), "a", "dynlora")["final"] == pytest.approx(85)


def test_the_page_has_its_plots_and_loads_nothing(tmp_path):
    page = rendered(finished(tmp_path))["index.html"]
    assert page.count("<svg") == 3
    outside = set(re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page))
    assert outside == set()


def test_the_same_files_give_the_same_bytes(tmp_path):
    finished(tmp_path)
    assert rendered(tmp_path) == rendered(tmp_path)
    assert {p.name: p.read_text(encoding="utf8") for p in render(tmp_path)} == rendered(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="holds no results of a suite"):
        rendered(tmp_path)


@pytest.mark.parametrize("suite_file", COMMITTED, ids=lambda p: p.parent.name)
def test_the_committed_tables_are_those_of_the_committed_results(suite_file):
    folder = suite_file.parent
    for name, content in rendered(folder).items():
        assert (folder / name).read_text(encoding="utf8") == content, name
