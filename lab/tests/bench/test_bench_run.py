"""Whole benches: cells in processes of their own, killed and resumed, shared, failing; slow."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dynlora_lab.bench.quick import quick_suite
from dynlora_lab.bench.render import TABLES
from dynlora_lab.bench.results import read_results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def suite_file(tmp_path):
    """Two cells of a few seconds: a task, two methods, one learning rate."""
    values = quick_suite(tmp_path / "parts").to_dict()
    values |= {"name": "two", "learning_rates": [0.03], "seeds": [0]}
    values["tasks"] = {"short": {"options": {"max_length": 6}, "data": {"max_train_rows": 64}}}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
    return path


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "dynlora", "bench", *map(str, arguments), "--threads", "1"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*arguments):
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out + err


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_the_quick_suite_runs_to_tables_with_full_provenance(tmp_path):
    code, text = ended("--quick", "--results", tmp_path)
    assert code == 0, text
    results = read_results(tmp_path)
    assert len(results) == 12
    for result in results.values():
        assert result["steps"] > 0
        assert result["versions"]["torch"]
        assert result["machine"]["threads"] == 1
        assert result["command"].endswith(f"--cell {result['cell']['key']}")
        assert str(tmp_path / "cells") not in json.dumps(result)
        assert 0 <= result["reported"]["final"] <= 1
        assert result["peak_memory_bytes"]["process"] > 2**20
    assert all((tmp_path / name).is_file() for name in TABLES)
    assert "12 of 12 cells are done" in (tmp_path / "README.md").read_text(encoding="utf8")
    shutil.rmtree(tmp_path / "work")
    before = time.monotonic()
    assert ended("--quick", "--results", tmp_path)[0] == 0
    assert read_results(tmp_path) == results
    assert time.monotonic() - before < 60


def test_a_killed_bench_goes_on_without_running_anything_twice(suite_file, tmp_path):
    folder = tmp_path / "results"
    first = start(suite_file, "--results", folder)
    wait_for(lambda: len(list((folder / "cells").glob("*.json"))) == 1)
    wait_for(lambda: list((folder / "work").glob("cell-*")))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = {p.name: p.read_bytes() for p in (folder / "cells").glob("*.json")}
    code, text = ended(suite_file, "--results", folder)
    assert code == 0, text
    assert len(read_results(folder)) == 2
    for name, content in kept.items():
        assert (folder / "cells" / name).read_bytes() == content


def test_ctrl_c_stops_the_cell_and_says_how_to_go_on(suite_file, tmp_path):
    folder = tmp_path / "results"
    first = start(suite_file, "--results", folder)
    wait_for(lambda: list((folder / "work").glob("cell-*/spec.json")))
    first.send_signal(signal.SIGINT)
    _, text = first.communicate(timeout=60)
    assert first.returncode == 130
    assert f"go on with: dynlora bench {suite_file} --results {folder}" in " ".join(text.split())
    assert not list((folder / "work").glob("cell-*"))


def test_two_benches_share_a_suite_and_each_cell_runs_once(suite_file, tmp_path):
    folder = tmp_path / "results"
    both = [start(suite_file, "--results", folder) for _ in range(2)]
    texts = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert sum(text.count("validation") for text in texts) == len(read_results(folder)) == 2


def test_a_cell_that_fails_is_kept_and_the_others_run(suite_file, tmp_path):
    folder = tmp_path / "results"
    values = yaml.safe_load(suite_file.read_text(encoding="utf8"))
    values["methods"]["dynlora"]["adapter"] = {"target_modules": ["nowhere"]}
    suite_file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf8")
    code, text = ended(suite_file, "--results", folder)
    assert code == 1, text
    by_method = {r["cell"]["method"]: r for r in read_results(folder).values()}
    assert by_method["lora"]["status"] == "done"
    assert by_method["dynlora"]["status"] == "failed"
    assert "No modules were targeted" in by_method["dynlora"]["error"]
