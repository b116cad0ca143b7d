"""Workers: what becomes of cells that end well, fail, die or are stopped, and of workers that fail."""

import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from bench_processes import run_here, run_scripts, shared, write_made_up
from bench_results import cell, result, score, small_suite
from dynlora_lab.bench import worker
from dynlora_lab.bench.claims import claimed
from dynlora_lab.bench.results import CELLS, DONE, FAILED, WORK, read_results, write_result
from dynlora_lab.bench.worker import Listener, run_workers, slots

CELL = cell("a", "lora", 0.01, 0)
ONE = slots(devices=[], workers=1, threads=1)
TWO = slots(devices=[], workers=2, threads=1)

KILLED = "import os; os.kill(os.getpid(), 9)"
FAILS = "open(__import__('sys').argv[2], 'w').write('Traceback:\\nValueError: no such column\\n'); exit(1)"
SILENT = "exit(1)"
HANGS = "import time; time.sleep(60)"
DEAF = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "open(sys.argv[2], 'w').close(); time.sleep(60)"
)
WELL = (  # as write_made_up, by a process of its own
    "import json, sys; spec = json.load(open(sys.argv[1]))\n"
    "found = {'status': 'done', 'cell': spec['cell'], 'selected': {'final': 0.5}}\n"
    "json.dump(found, open(spec['result'], 'w'))"
)


def one_cell(folder, **fields):
    return shared(folder, only=frozenset({CELL.key}), **fields)


def heard():
    """A listener that keeps what it hears."""
    told = []
    return told, Listener(
        on_start=lambda c, slot: told.append(("start", c.key, slot)),
        on_end=lambda c, found, _seconds: told.append(("end", c.key, found and found["status"])),
    )


def is_free(folder):
    with claimed(folder, CELL.key) as is_ours:
        return is_ours


def in_thread(bench, listener=None):
    """Workers beside the test; ``join`` waits for them."""
    thread = threading.Thread(target=run_workers, args=(bench, ONE, listener or Listener()))
    thread.start()
    return thread


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# -- cells that end well -----------------------------------------------------------------------


def test_workers_run_all_that_becomes_due_and_each_cell_once(tmp_path, monkeypatch):
    bench = shared(tmp_path)
    run_here(monkeypatch, write_made_up)
    told, listener = heard()
    run_workers(bench, TWO, listener)
    found = read_results(tmp_path)
    assert len(found) == 16  # the sweep, then two more seeds at the rate that it chose
    assert sorted(key for kind, key, _ in told if kind == "start") == sorted(found)
    assert {about for kind, _, about in told if kind == "end"} == {DONE}
    assert {about for kind, _, about in told if kind == "start"} <= {"worker 0", "worker 1"}
    for key, one in found.items():
        assert one["selected"]["final"] == pytest.approx(score(cell(*_parts(one))))
        assert one["command"] == f"dynlora bench s.yaml --cell {key}"
        assert 0 <= one["wall_s"] < 60
    assert [p.name for p in (tmp_path / WORK).glob("cell-*")] == []
    told.clear()
    run_workers(bench, TWO, listener)
    assert told == []


def _parts(found):
    return [found["cell"][k] for k in ("task", "method", "learning_rate", "seed")]


def test_a_cell_is_told_its_recipe_its_sets_and_the_ranks_that_it_takes(tmp_path, monkeypatch):
    methods = {"dynlora": {"method": "dynlora"}, "lora": {"method": "lora", "ranks_of": "dynlora"}}
    suite = small_suite(methods=methods, tasks={"a": {"report": ["test", "hard"]}}, seeds=[0])
    specs = {}

    def keep(path):
        spec = json.loads(path.read_text(encoding="utf8"))
        specs[spec["cell"]["key"]] = spec
        write_made_up(path)

    run_here(monkeypatch, keep)
    run_workers(shared(tmp_path, suite), ONE, Listener())
    taker, giver = specs[CELL.key], specs["a--dynlora--lr0.01--seed0"]
    assert list(specs)[:2] == ["a--dynlora--lr0.001--seed0", "a--dynlora--lr0.01--seed0"]
    assert taker["recipe"]["adapter"] == {"ranks": {"q": 2}}  # what the made-up dynlora ended with
    assert "adapter" not in giver["recipe"]
    assert (taker["select"], taker["report"]) == ("validation", ["test", "hard"])
    assert Path(taker["recipe"]["output"]).parent == Path(taker["result"]).parent


def test_a_worker_waits_for_the_cell_of_another_one_and_takes_its_result_over(
    tmp_path, monkeypatch
):
    bench = one_cell(tmp_path)
    run_here(monkeypatch, write_made_up)
    told, listener = heard()
    with claimed(tmp_path, CELL.key):
        waiting = in_thread(bench, listener)
        waiting.join(0.5)
        assert waiting.is_alive()
        write_result(tmp_path, CELL.key, result(CELL, 0.75))
    waiting.join(60)
    assert told == []
    assert read_results(tmp_path) == {CELL.key: result(CELL, 0.75)}


# -- cells that do not -------------------------------------------------------------------------


def test_a_cell_that_fails_is_kept_with_its_last_line_and_its_log(tmp_path, monkeypatch):
    run_scripts(monkeypatch, FAILS)
    told, listener = heard()
    run_workers(one_cell(tmp_path), ONE, listener)
    found = read_results(tmp_path)[CELL.key]
    assert (found["status"], found["error"]) == (FAILED, "ValueError: no such column")
    assert found["cell"] == vars(CELL) | {"key": CELL.key}
    assert found["command"].endswith(f"--cell {CELL.key}")
    assert "Traceback" in (tmp_path / WORK / f"{CELL.key}.log").read_text(encoding="utf8")
    assert told == [("start", CELL.key, "worker 0"), ("end", CELL.key, FAILED)]


def test_a_cell_that_fails_before_it_says_a_word_is_kept_too(tmp_path, monkeypatch):
    run_scripts(monkeypatch, SILENT)
    run_workers(one_cell(tmp_path), ONE, Listener())
    assert read_results(tmp_path)[CELL.key]["error"] == "no message"
    assert (tmp_path / WORK / f"{CELL.key}.log").read_text(encoding="utf8") == ""


def test_a_cell_that_was_killed_is_tried_again(tmp_path, monkeypatch):
    run_scripts(monkeypatch, KILLED, WELL)
    told, listener = heard()
    run_workers(one_cell(tmp_path), ONE, listener)
    assert [about for kind, _, about in told if kind == "end"] == [None, DONE]
    assert read_results(tmp_path)[CELL.key]["selected"]["final"] == 0.5


def test_a_cell_that_is_killed_each_time_has_failed(tmp_path, monkeypatch):
    run_scripts(monkeypatch, KILLED)
    told, listener = heard()
    bench = one_cell(tmp_path)
    run_workers(bench, ONE, listener)
    assert [about for kind, _, about in told if kind == "end"] == [None, FAILED]
    assert read_results(tmp_path)[CELL.key]["error"] == "ended by signal 9"


# -- stops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [HANGS, DEAF], ids=["listens", "deaf to SIGTERM"])
def test_a_cell_that_is_stopped_ends_and_is_free_again(tmp_path, monkeypatch, code):
    run_scripts(monkeypatch, code)
    monkeypatch.setattr(worker, "STOP_S", 0.3)
    told, listener = heard()
    bench = one_cell(tmp_path)
    running = in_thread(bench, listener)
    begun = "cell-*/log.txt" if code is DEAF else "cell-*/spec.json"
    wait_for(lambda: list((tmp_path / WORK).glob(begun)) and psutil.Process().children())
    bench.stop.set()
    running.join(60)
    assert not running.is_alive()
    assert psutil.Process().children() == []
    assert told == [("start", CELL.key, "worker 0"), ("end", CELL.key, None)]
    assert read_results(tmp_path) == {}
    assert is_free(tmp_path)
    assert not list((tmp_path / WORK).glob("*.died"))


def test_a_stop_loses_no_result_that_is_written_already(tmp_path, monkeypatch):
    """Not even of a cell that was killed once: it would count as dead for the second time."""
    run_scripts(monkeypatch, KILLED, f"{WELL}\n{HANGS}")
    bench = one_cell(tmp_path)
    running = in_thread(bench)
    wait_for(lambda: any(p.stat().st_size for p in (tmp_path / WORK).glob("cell-*/result.json")))
    bench.stop.set()
    running.join(60)
    assert read_results(tmp_path)[CELL.key]["status"] == DONE
    assert not is_free(tmp_path)


def test_a_process_that_crashes_after_its_result_has_done_its_cell(tmp_path, monkeypatch):
    run_scripts(monkeypatch, f"{WELL}\n{KILLED}")
    run_workers(one_cell(tmp_path), ONE, Listener())
    assert read_results(tmp_path)[CELL.key]["selected"]["final"] == 0.5


def test_workers_that_are_stopped_claim_nothing(tmp_path):
    bench = shared(tmp_path)
    bench.stop.set()
    run_workers(bench, TWO, Listener())
    assert not list((tmp_path / WORK).glob("*.lock"))


def test_a_worker_that_fails_ends_the_others_and_is_reported(tmp_path):
    bench = shared(tmp_path)
    (tmp_path / CELLS / "damaged.json").write_text("{", encoding="utf8")
    with pytest.raises(RuntimeError, match=r"a worker failed: .*damaged.json is no result"):
        run_workers(bench, TWO, Listener())
    assert bench.stop.is_set()


def test_a_worker_that_cannot_start_processes_leaves_its_cell_to_others(tmp_path, monkeypatch):
    def no_more(_spec):
        raise BlockingIOError("Resource temporarily unavailable")

    run_here(monkeypatch, no_more)
    bench = one_cell(tmp_path)
    with pytest.raises(RuntimeError, match="a worker failed: Resource temporarily unavailable"):
        run_workers(bench, ONE, Listener())
    assert is_free(tmp_path)


def test_only_the_named_cells_are_due(tmp_path):
    bench = one_cell(tmp_path)
    assert [c.key for c in bench.due({})] == [CELL.key]


def test_a_slot_sets_its_variables_for_its_cells_alone(tmp_path, monkeypatch):
    seen = []

    class Process:
        exitcode = 0

        def __init__(self, *, target, args):
            seen.append((target, args))

        def start(self):
            write_made_up(seen[-1][1][0])

        def is_alive(self):
            return False

        def join(self, _timeout=None):
            return

    monkeypatch.setattr(worker, "_CELLS", type("Context", (), {"Process": Process}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run_workers(one_cell(tmp_path), slots(devices=["3"], workers=1, threads=2), Listener())
    [(target, (_, log, environment))] = seen
    assert target is worker.run_cell
    assert environment == {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2"}
    assert log.name == "log.txt"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
