"""``dynlora bench`` as a command: runs, stops, mistakes, rendering, and what the live table shows."""

import io
import re
import signal

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from bench_processes import run_here, run_scripts, write_made_up
from bench_results import cell, failed, finished, result, run_all, score, small_suite
from dynlora.cli.main import app
from dynlora_lab.bench.quick import quick_suite
from dynlora_lab.bench.results import read_results
from dynlora_lab.bench.worker import slots
from dynlora_lab.cli import bench as bench_command
from dynlora_lab.cli.bench import Watch, progress_view


def bench(*arguments, **env):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env=env)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Values of the quick suite, its model and its data made."""
    return quick_suite(tmp_path_factory.mktemp("parts")).to_dict()


@pytest.fixture
def two(parts, tmp_path):
    """The file of a suite of two short cells: a task, two methods, one learning rate."""
    values = {**parts, "name": "two", "learning_rates": [0.03], "seeds": [0]}
    few = {"max_train_rows": 96, "max_eval_rows": 16}
    values["tasks"] = {"short": {"options": {"max_length": 6}, "data": few}}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
    return path


LORA, DYNLORA = "short--lora--lr0.03--seed0", "short--dynlora--lr0.03--seed0"


def test_a_suite_is_run_to_its_tables_with_a_line_a_cell(two, tmp_path, monkeypatch):
    run_here(monkeypatch)
    folder = tmp_path / "results"
    ran = bench(two, "--results", folder)
    assert ran.exit_code == 0, ran.stderr
    results = read_results(folder)
    assert results.keys() == {LORA, DYNLORA}
    lines = ran.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"1/2 {LORA}", f"2/2 {DYNLORA}"]
    for line, key in zip(lines, (LORA, DYNLORA), strict=True):
        assert f"validation {results[key]['selected']['final']:.4f}, " in line
        assert results[key]["command"].endswith(f"two.yaml --results {folder} --cell {key}")
    assert re.search(r"about \d+ s left$", lines[0])
    assert lines[1].endswith("about 0 s left")
    assert "2 of 2 cells are done" in (folder / "README.md").read_text(encoding="utf8")
    assert str(folder / "README.md") in ran.stdout


def test_cells_that_failed_are_exit_code_1_and_run_again_when_asked_to(two, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    run_scripts(
        monkeypatch, "import sys; open(sys.argv[2], 'w').write('OSError: disk full'); exit(1)"
    )
    ran = bench(two, "--results", folder, "--cell", LORA)
    assert ran.exit_code == 1
    line, reason, log, way_out = ran.stderr.splitlines()
    assert re.fullmatch(rf"1/2 {LORA}: failed after \d+ s, about \d+ s left", line)
    assert reason == "    OSError: disk full"
    kept = folder / "work" / f"{LORA}.log"
    assert log == f"    log: {kept}"
    assert kept.read_text(encoding="utf8") == "OSError: disk full"
    command = f"dynlora bench {two} --results {folder} --retry-failed"
    assert way_out == f"dynlora: 1 cell failed; run again with: {command}"
    assert read_results(folder)[LORA]["status"] == "failed"
    run_here(monkeypatch, write_made_up)
    again = bench(two, "--results", folder, "--cell", LORA)
    assert (again.exit_code, again.stderr) == (1, f"{way_out}\n")  # tried is tried
    ran = bench(two, "--results", folder, "--cell", LORA, "--retry-failed")
    assert ran.exit_code == 0, ran.stderr
    assert read_results(folder)[LORA]["status"] == "done"


def test_a_cell_that_is_tried_again_tells_of_itself_once(two, tmp_path, monkeypatch):
    well = (
        "import json, sys; spec = json.load(open(sys.argv[1])); found = spec | {'status': 'failed'}"
    )
    dump = "json.dump(found | {'error': 'late'}, open(spec['result'], 'w'))"
    run_scripts(monkeypatch, "import os; os.kill(os.getpid(), 9)", f"{well}; {dump}")
    ran = bench(two, "--results", tmp_path / "results", "--cell", LORA)
    line, reason, _log_of_the_first_try, way_out = ran.stderr.splitlines()
    assert (line.partition(":")[0], reason) == (f"1/2 {LORA}", "    late")
    assert way_out.startswith("dynlora: 1 cell failed;")


def test_a_cell_that_is_not_due_is_refused_and_the_others_run(two, tmp_path, monkeypatch):
    run_here(monkeypatch)
    folder = tmp_path / "results"
    other = LORA.replace("0.03", "0.3")
    ran = bench(two, "--results", folder, "--cell", LORA, "--cell", other)
    assert ran.exit_code == 2
    assert f"--cell {other} names no cell that is due" in " ".join(ran.stderr.split())
    assert read_results(folder).keys() == {LORA}


PARAGRAPH = "ValueError: " + "the checkpoint has ranks that this model cannot take; " * 20


@pytest.mark.parametrize("terminal", [{}, {"FORCE_COLOR": "1"}])
def test_an_error_as_long_as_a_paragraph_takes_few_lines_of_a_narrow_terminal(
    two, tmp_path, monkeypatch, terminal
):
    run_scripts(monkeypatch, f"import sys; open(sys.argv[2], 'w').write({PARAGRAPH!r}); exit(1)")
    monkeypatch.chdir(tmp_path)
    ran = bench(two, "--results", "out", "--cell", LORA, COLUMNS="80", **terminal)
    plain = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", ran.stderr)
    begin = plain.index(f"{LORA}: failed after")
    line, *reason, log = plain[begin : plain.index("log: ")].splitlines()
    assert [bool(line), len(reason), log.strip()] == [True, 3, ""]
    assert all(len(one) <= 80 and one.startswith("    ") for one in (*reason, log))
    assert reason[0].startswith("    ValueError: the checkpoint has ranks")
    assert reason[-1].endswith(" …")


def test_ctrl_c_ends_the_bench_says_how_to_go_on_and_is_ours_no_more(two, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    run_scripts(monkeypatch, "import os, time; os.kill(os.getppid(), 2); time.sleep(60)")
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    ran = bench(two, "--results", folder)
    assert ran.exit_code == 130
    assert f"go on with: dynlora bench {two} --results {folder}" in ran.stderr
    assert read_results(folder) == {}
    assert list((folder / "work").glob("cell-*")) == []
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_terminal_shows_the_live_table_instead_of_lines(two, tmp_path, monkeypatch):
    run_here(monkeypatch, write_made_up)
    monkeypatch.setattr(bench_command, "REFRESH_S", 0.05)
    ran = bench(two, "--results", tmp_path / "results", FORCE_COLOR="1", COLUMNS="100")
    assert ran.exit_code == 0, ran.stderr
    assert "2 of 2 cells" in ran.stderr
    assert f"{LORA}:" not in ran.stderr
    assert len(read_results(tmp_path / "results")) == 2


def test_a_folder_of_results_that_nobody_named_is_found_by_the_suites_name(
    two, tmp_path, monkeypatch
):
    run_here(monkeypatch, write_made_up)
    monkeypatch.chdir(tmp_path)
    ran = bench("two.yaml", "--cell", LORA)
    assert ran.exit_code == 0, ran.stderr
    found = read_results(tmp_path / "lab" / "results" / "two")
    assert found[LORA]["command"] == f"dynlora bench two.yaml --cell {LORA}"


def test_quick_makes_its_own_parts_and_can_be_typed_again(tmp_path, monkeypatch):
    run_here(monkeypatch, write_made_up)
    monkeypatch.chdir(tmp_path)
    key = "glosses--lora--lr0.01--seed0"
    ran = bench("--quick", "--cell", key)
    assert ran.exit_code == 0, ran.stderr
    found = read_results(tmp_path / "dynlora-bench-quick")
    assert found[key]["command"] == f"dynlora bench --quick --cell {key}"
    assert (tmp_path / "dynlora-bench-quick" / "parts" / "tiny-bert" / "config.json").is_file()


def test_a_bench_that_fails_is_one_line_and_exit_code_1(two, tmp_path, monkeypatch):
    def no_more(_spec):
        raise BlockingIOError("Resource temporarily unavailable")

    run_here(monkeypatch, no_more)
    ran = bench(two, "--results", tmp_path / "results")
    assert ran.exit_code == 1
    assert ran.stderr == "dynlora: a worker failed: Resource temporarily unavailable\n"
    raised = bench(two, "--results", tmp_path / "results", "--debug").exception
    assert isinstance(raised, RuntimeError)


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


def test_long_rests_are_told_in_hours_and_minutes():
    assert "about 2 s left" in shown_rest(1)
    assert "about 2:05 left" in shown_rest(62.4)
    assert "about 1:02:03 left" in shown_rest(1861.4)


def shown_rest(seconds):
    """The live table of a suite of which four cells are left for two workers."""
    suite = small_suite()
    results, order = run_all(suite)
    watch = Watch(seconds=[seconds])
    return shown(suite, {c.key: results[c.key] for c in order[:12]}, watch)


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
