"""Workers: a worker that fails ends them all and is heard of."""

import threading

import pytest

from bench_results import small_suite
from dynlora.bench.results import CELLS, open_folder
from dynlora.bench.worker import Bench, Listener, run_workers, slots


def shared(folder, **fields):
    suite = small_suite()
    open_folder(folder, suite)
    about = {"suite": suite, "folder": folder, "storage": None, "command": "dynlora bench s.yaml"}
    return Bench(**{**about, "only": None, "stop": threading.Event(), **fields})


def test_a_worker_that_fails_ends_the_others_and_is_reported(tmp_path):
    bench = shared(tmp_path)
    (tmp_path / CELLS / "damaged.json").write_text("{", encoding="utf8")
    with pytest.raises(RuntimeError, match=r"a worker failed: .*damaged.json is no result"):
        run_workers(bench, slots(devices=[], workers=2, threads=1), Listener())
    assert bench.stop.is_set()


def test_workers_that_are_stopped_claim_nothing(tmp_path):
    bench = shared(tmp_path)
    bench.stop.set()
    run_workers(bench, slots(devices=[], workers=2, threads=1), Listener())
    assert bench.ledger().running() == set()


def test_only_the_named_cells_are_due(tmp_path):
    bench = shared(tmp_path, only=frozenset({"a--lora--lr0.01--seed0"}))
    assert [cell.key for cell in bench.due({})] == ["a--lora--lr0.01--seed0"]
