"""Reports in the terminal of runs that lack something: losses, ranks, prunings, logs."""

import io
import json

from rich.console import Console

from dynlora.history import HISTORY_FILE
from dynlora.report.run import read_run
from dynlora.report.terminal import report_view
from runs_on_disk import write_run


def in_terminal(view):
    console = Console(width=80, file=io.StringIO())
    console.print(view)
    return console.file.getvalue()


def run_with(folder, keep):
    """A run of 100 steps whose history holds only the events for which ``keep`` is true."""
    file = write_run(folder) / HISTORY_FILE
    lines = file.read_text(encoding="utf8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if keep(json.loads(line))), encoding="utf8")
    return read_run(folder)


def test_a_run_that_has_just_begun_shows_its_ranks_and_no_curve(tmp_path):
    text = in_terminal(report_view([run_with(tmp_path, lambda e: e["event"] == "start")], width=80))
    assert "0 of 100 (0%)" in text
    assert "60 → 60" in text
    assert "loss" not in text
    assert "prunings" not in text


def test_a_run_under_way_shows_its_last_measurement_and_its_prunings(tmp_path):
    run = run_with(tmp_path, lambda e: e["step"] <= 50)
    text = in_terminal(report_view([run], width=80))
    assert "50 of 100 (50%)" in text
    assert "loss" in text
    assert "accuracy" in text
    assert "0.5" in text
    assert "10, 10 cut, 0 revived" in text


def test_a_run_without_ranks_shows_its_numbers_alone(tmp_path):
    run = run_with(tmp_path, lambda e: e["event"] == "log")
    assert run.ranks == {}
    text = in_terminal(report_view([run], width=80))
    assert "100 of 100" in text
    assert "components" not in text
    assert "loss 2 → 0.02" in text


def test_a_report_of_a_run_that_logged_nothing_shows_its_ranks(tmp_path):
    run = run_with(tmp_path, lambda e: e["event"] != "log")
    text = in_terminal(report_view([run], width=80))
    assert " → 0.02" not in text
    assert "attention.self.query" in text
