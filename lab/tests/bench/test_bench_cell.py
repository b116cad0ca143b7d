"""From the record of a real run to the result of a cell, and the process that it runs in."""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import torch

from bench_results import cell
from dynlora_lab.bench import cell as cell_module
from dynlora_lab.bench.cell import cell_result, run_cell, run_spec
from dynlora_lab.bench.quick import quick_suite
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from dynlora_lab.tasks.run_files import read_run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Recipe and record of one cell of the quick suite."""
    folder = tmp_path_factory.mktemp("cell")
    suite = quick_suite(folder / "parts")
    values = suite.recipe(cell("short-glosses", "dynlora", 0.03, 0), folder / "run")
    values["data"]["max_train_rows"] = 128
    values["adapter"]["importance"] = "norm"
    recipe = recipe_from(values)
    run(recipe)
    return recipe, read_run(recipe.output)


def test_the_result_tells_choosing_and_reported_scores_apart(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test"])
    assert result["metric"] == "accuracy"
    assert result["is_better_higher"] is True
    assert result["selected"]["final"] == record["metrics"]["eval_validation_accuracy"]
    assert result["reported"]["final"] == record["metrics"]["eval_test_accuracy"]
    assert result["steps"] == 24
    assert result["budget"]["components_end"] == sum(result["ranks"].values())
    assert result["base_sha256"] == []  # a folder of the user's own
    json.dumps(result)


def test_the_best_epoch_is_chosen_on_the_selecting_set_within_the_budget(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test"])
    frozen = [e for e in result["curve"] if e["step"] >= 12]  # prune_end is half of the run
    assert result["selected"]["best"] == max(e["selected"] for e in frozen)
    at = next(e for e in frozen if e["step"] == result["best_step"])
    assert result["reported"]["best"] == at["reported"]


def test_several_reported_sets_are_averaged(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test", "validation"])
    both = (result["selected"]["final"] + record["metrics"]["eval_test_accuracy"]) / 2
    assert result["reported"]["final"] == pytest.approx(both)


def test_the_recipe_in_a_result_names_no_folder_of_the_run(ran):
    recipe, record = ran
    result = cell_result(recipe, record, select="validation", report=["test"])
    assert "output" not in result["recipe"]
    assert result["recipe"]["adapter"]["importance"] == "norm"


def test_a_spec_becomes_a_result_with_the_times_and_the_memory_of_the_run(tmp_path):
    suite = quick_suite(tmp_path / "parts")
    made = cell("short-glosses", "lora", 0.03, 0)
    values = suite.recipe(made, tmp_path / "run")
    values["data"] |= {"max_train_rows": 32, "max_eval_rows": 16}
    spec = {
        "recipe": values,
        "select": "validation",
        "report": ["test"],
        "cell": vars(made) | {"key": made.key},
        "command": f"dynlora bench --quick --cell {made.key}",
        "result": str(tmp_path / "result.json"),
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf8")
    began = datetime.now(UTC).replace(microsecond=0)
    run_spec(tmp_path / "spec.json")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf8"))
    recipe, record = recipe_from(values), read_run(tmp_path / "run")
    expected = cell_result(recipe, record, select="validation", report=["test"])
    assert {name: result[name] for name in expected} == expected
    assert (result["cell"], result["command"]) == (spec["cell"], spec["command"])
    assert began <= datetime.fromisoformat(result["started"]) <= datetime.now(UTC)
    assert result["cpu_s"] >= result["train_s"] / 10  # of this whole process
    assert result["peak_memory_bytes"]["process"] >= 2**26  # torch alone is more


def test_the_memory_of_an_accelerator_is_told_beside_that_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert cell_module._peak_memory_bytes()["cuda"] == 3 * 2**30


@contextlib.contextmanager
def own_process(folder):
    """Standard streams and variables that a cell may take; all is as before in the end."""
    threads = torch.get_num_threads()
    with (
        pytest.MonkeyPatch.context() as patch,
        (folder / "out").open("w") as out,
        (folder / "err").open("w") as err,
    ):
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch
    torch.set_num_threads(threads)


def test_a_cell_stands_alone_and_computes_on_what_its_slot_says(tmp_path):
    seen = {}

    def compute(spec):
        seen.update(spec=spec, devices=os.environ["CUDA_VISIBLE_DEVICES"])
        seen["threads"] = torch.get_num_threads()
        sys.stdout.write("step 1\n")
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), b"NaN at step 2\n")  # as libraries in C do

    slot = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2"}
    with own_process(tmp_path) as patch:
        patch.setattr(os, "setsid", lambda: seen.update(own_session=True))
        patch.setattr(cell_module, "run_spec", compute)
        run_cell(tmp_path / "spec.json", tmp_path / "log.txt", slot)
    expected = {"own_session": True, "devices": "3", "threads": 2, "spec": tmp_path / "spec.json"}
    assert seen == expected
    assert (tmp_path / "log.txt").read_text() == "step 1\nNaN at step 2\n"
    assert (tmp_path / "out").read_text() == (tmp_path / "err").read_text() == ""


def test_without_a_number_of_threads_a_cell_keeps_what_torch_has_chosen(tmp_path):
    seen = []
    with own_process(tmp_path) as patch:
        patch.delattr(os, "setsid", raising=False)  # as on Windows
        patch.setattr(cell_module, "run_spec", lambda _: seen.append(torch.get_num_threads()))
        torch.set_num_threads(2)
        run_cell(tmp_path / "spec.json", tmp_path / "log.txt", {"CUDA_VISIBLE_DEVICES": "1"})
    assert seen == [2]


def test_a_cell_ends_when_its_worker_is_gone_and_not_before(monkeypatch):
    gone, ended, codes = threading.Event(), threading.Event(), []

    def exit_now(code):
        codes.append(code)
        ended.set()

    parent = SimpleNamespace(join=gone.wait)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(os, "_exit", exit_now)
    watching = threading.Thread(target=cell_module._end_with_parent)
    watching.start()
    assert not ended.wait(0.1)
    gone.set()
    watching.join()
    assert codes == [1]
