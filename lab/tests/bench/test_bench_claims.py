"""Claims: one winner for every cell, and free again when its worker ends, however it ends."""

import subprocess
import sys
import threading

import pytest

from bench_processes import shared
from bench_results import cell, failed, result
from dynlora_lab.bench.claims import claimed, free, has_died
from dynlora_lab.bench.results import read_results, write_result

CELL = cell("a", "lora", 0.01, 0)
KEY = CELL.key


@pytest.fixture
def folder(tmp_path):
    return shared(tmp_path).folder


def is_free(folder, key=KEY):
    with claimed(folder, key) as is_ours:
        return is_ours


def test_a_cell_is_claimed_once_and_free_again_afterwards(folder):
    with claimed(folder, KEY) as is_ours:
        assert is_ours
        assert not is_free(folder)
        assert is_free(folder, cell("a", "lora", 0.01, 1).key)
    assert is_free(folder)


def test_of_many_workers_at_once_exactly_one_wins(folder):
    start, end, won = threading.Barrier(6), threading.Barrier(6), []

    def race():
        start.wait()
        with claimed(folder, KEY) as is_ours:
            won.append(is_ours)
            end.wait()

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]


def test_a_claim_ends_with_the_process_that_was_killed(folder):
    code = (
        "import sys, pathlib, filelock\n"
        "lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    path = folder / "work" / f"{KEY}.lock"
    worker = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline() == "held\n"
    assert not is_free(folder)
    worker.kill()
    worker.communicate()
    assert is_free(folder)


@pytest.mark.parametrize("outcome", [result(CELL, 0.75), failed(CELL)], ids=["done", "failed"])
def test_a_finished_cell_is_claimed_by_nobody_until_it_is_freed(folder, outcome):
    write_result(folder, KEY, outcome)
    assert not is_free(folder)
    free(folder, KEY)
    assert read_results(folder) == {}
    assert is_free(folder)


def test_the_second_death_counts_and_a_freed_cell_starts_at_none(folder):
    assert [has_died(folder, KEY), has_died(folder, KEY)] == [False, True]
    write_result(folder, KEY, failed(CELL))
    free(folder, KEY)
    assert not has_died(folder, KEY)
