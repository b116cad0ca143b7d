"""``dynlora bench`` as a command: mistakes, rendering, and what the live table shows."""

import io

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from bench_results import cell, failed, result, score, small_suite
from dynlora.bench.quick import quick_suite
from dynlora.bench.worker import slots
from dynlora.cli.bench import Watch, progress_view
from dynlora.cli.main import app
from test_bench_plan import run_all
from test_bench_tables import finished


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.parametrize("arguments", [(), ("suite.yaml", "--quick")])
def test_a_suite_or_quick_must_be_named(arguments):
    ran = bench(*arguments)
    assert ran.exit_code == 2
    assert "name a SUITE.yaml, or give --quick" in ran.stderr


def test_an_unfit_suite_is_one_line_and_exit_code_2(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "sedes": [1]}), encoding="utf8")
    ran = bench(path)
    assert ran.exit_code == 2
    assert "unknown field 'sedes'; did you mean 'seeds'" in " ".join(ran.stderr.split())
    assert ran.stderr.count("\n") == 1


def test_data_that_is_missing_stops_the_bench_before_any_cell(tmp_path):
    values = quick_suite(tmp_path / "parts").to_dict()
    values["tasks"]["glosses"]["data"] = {"name": str(tmp_path / "none.csv")}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
    ran = bench(path, "--results", tmp_path / "results")
    assert ran.exit_code == 2
    assert "task 'glosses': data " in ran.stderr
    assert not list((tmp_path / "results" / "cells").iterdir())


def shown(suite, results, watch=None):
    text = io.StringIO()
    Console(file=text, width=100).print(progress_view(suite, results, watch or Watch(), 2))
    return text.getvalue()


def test_the_live_table_shows_what_is_done_and_how_long_the_rest_takes():
    suite = small_suite()
    results, order = run_all(suite)
    half = {c.key: results[c.key] for c in order[:12]}
    text = shown(suite, half)
    assert "12 of 16 cells, about 24 s left" in text  # 4 cells of 12 s on 2 workers
    assert "81.0 at 0.01" not in text
    assert "85.5 at 0.01, 3 cells" in text  # dynlora on a: seeds 0 and 1


def test_the_live_table_names_failures_and_running_cells():
    suite, watch = small_suite(), Watch()
    bad = cell("a", "lora", 0.01, 0)
    watch.start(cell("b", "lora", 0.01, 0), "worker 1")
    text = shown(suite, {bad.key: failed(bad)}, watch)
    assert "1 cell, 1 failed" in text
    assert "worker 1: b--lora--lr0.01--seed0" in text


def test_a_cell_that_was_stopped_tells_nothing_about_durations():
    watch, made = Watch(), cell("a", "lora", 0.01, 0)
    watch.start(made, "worker 0")
    watch.end(made, None, 1.0)
    assert (watch.running, watch.seconds) == ({}, [])
    watch.end(made, result(made, score(made)), 2.0)
    assert watch.seconds == [2.0]


def test_workers_without_devices_share_the_machine():
    places = slots(devices=[], workers=2, threads=1)
    assert [s.environment for s in places] == [{"OMP_NUM_THREADS": "1"}] * 2
    assert len({s.name for s in places}) == 2


def test_render_writes_the_tables_and_runs_nothing(tmp_path):
    suite = {
        "name": "small",
        "defaults": {
            "task": "text-classification",
            "model": "m",
            "data": {"name": "d.csv", "evals": {"validation": "v", "test": "t"}},
        },
        "tasks": {"a": {}, "b": {}},
        "methods": {"lora": {"method": "lora"}, "dynlora": {"method": "dynlora"}},
        "learning_rates": [0.01, 0.001],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf8")
    folder = finished(tmp_path / "results")
    ran = bench(path, "--results", folder, "--render")
    assert ran.exit_code == 0
    assert str(folder / "README.md") in ran.stdout
    assert "16 of 16 cells are done" in (folder / "README.md").read_text(encoding="utf8")
