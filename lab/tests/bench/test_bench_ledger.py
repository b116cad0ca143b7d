"""The ledger: one winner for every cell, void claims, results that travel."""

import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import IntegrityError, ProgrammingError

from bench_results import cell, failed, result
from dynlora_lab.bench import ledger as ledger_module
from dynlora_lab.bench.ledger import LEASE_S, MAX_RACES, Ledger

CELL = cell("a", "lora", 0.01, 0)


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.log"


def opened(journal):
    return Ledger(None, journal, "small")


def foreign_claim(ledger, **attrs):
    """A claim by another worker, as it stands in the study."""
    mine = {"pid": os.getpid(), "began": psutil.Process().create_time()}
    about = {
        "cell": CELL.key,
        "token": "theirs",
        "alive": time.time(),
        "host": socket.gethostname(),
    }
    ledger._study.add_trial(
        create_trial(state=TrialState.RUNNING, user_attrs={**about, **mine, **attrs})
    )


def test_a_cell_is_claimed_once(journal):
    first, second = opened(journal), opened(journal)
    number = first.claim(CELL.key)
    assert number is not None
    assert second.claim(CELL.key) is None
    assert second.running() == {CELL.key}
    assert second.claim(cell("a", "lora", 0.01, 1).key) is not None


def test_of_many_workers_at_once_exactly_one_wins(journal):
    ledgers = [opened(journal) for _ in range(6)]
    start, won = threading.Barrier(len(ledgers)), []

    def race(ledger):
        start.wait()
        won.append(ledger.claim(CELL.key))

    threads = [threading.Thread(target=race, args=(one,)) for one in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([number for number in won if number is not None]) == 1


def test_what_is_given_up_is_free_again(journal):
    one = opened(journal)
    one.give_up(one.claim(CELL.key))
    assert one.running() == set()
    assert opened(journal).claim(CELL.key) is not None


def test_a_finished_cell_is_never_claimed_again_and_its_result_travels(journal):
    one, other = opened(journal), opened(journal)
    one.finish(one.claim(CELL.key), result(CELL, 0.75))
    assert other.claim(CELL.key) is None
    assert other.results({}) == {CELL.key: result(CELL, 0.75)}
    assert other.results({CELL.key: ...}) == {}


def test_a_failed_cell_is_finished_too_until_it_is_forgotten(journal):
    one = opened(journal)
    one.finish(one.claim(CELL.key), failed(CELL))
    assert one.claim(CELL.key) is None
    one.forget([CELL.key])
    assert one.results({}) == {}
    assert opened(journal).claim(CELL.key) is not None


def test_a_claim_of_a_process_that_is_gone_is_void(journal):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    one = opened(journal)
    foreign_claim(one, pid=done.pid)
    assert one.claim(CELL.key) is not None


def test_a_claim_whose_process_id_was_given_to_another_process_is_void(journal):
    one = opened(journal)
    foreign_claim(one, began=psutil.Process().create_time() - 100)
    assert one.claim(CELL.key) is not None


def test_a_claim_on_another_machine_holds_as_long_as_it_is_renewed(journal):
    one, other = opened(journal), cell("b", "lora", 0.01, 0)
    long_ago = time.time() - LEASE_S - 1
    foreign_claim(one, host="elsewhere", alive=long_ago)
    foreign_claim(one, host="elsewhere", alive=long_ago, cell=other.key)
    one.renew(0)
    assert one.running() == {CELL.key}
    assert one.claim(CELL.key) is None
    assert one.claim(other.key) is not None


def test_deaths_are_counted_and_stops_are_not(journal):
    one = opened(journal)
    one.give_up(one.claim(CELL.key), died=True)
    one.give_up(one.claim(CELL.key))
    assert one.deaths(CELL.key) == 1


class Racing:
    """In place of RDBStorage: the tables of a new database are just being made by others."""

    def __init__(self, errors):
        self.errors, self.tries = list(errors), 0

    def __call__(self, url):
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return InMemoryStorage()


def refused(kind):
    return kind("CREATE TABLE studies", None, Exception("duplicate key"))


def test_a_worker_that_comes_while_the_tables_are_made_waits_and_comes_again(tmp_path, monkeypatch):
    storage, waited = Racing([refused(IntegrityError), refused(ProgrammingError)]), []
    monkeypatch.setattr(ledger_module, "RDBStorage", storage)
    monkeypatch.setattr(time, "sleep", waited.append)
    one = Ledger("postgresql+psycopg://bench@/postgres", tmp_path / "unused", "small")
    assert one.claim(CELL.key) is not None
    assert storage.tries == 3
    assert [0.5 <= seconds <= 2 for seconds in waited] == [True, True]
    assert not (tmp_path / "unused").exists()


def test_a_database_that_refuses_its_tables_again_and_again_is_an_error(tmp_path, monkeypatch):
    storage = Racing([refused(ProgrammingError)] * (MAX_RACES + 1))
    monkeypatch.setattr(ledger_module, "RDBStorage", storage)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    with pytest.raises(ProgrammingError, match="duplicate key"):
        Ledger("postgresql+psycopg://bench@/postgres", tmp_path / "unused", "small")
    assert storage.tries == MAX_RACES + 1


def test_a_claim_that_comes_second_withdraws(journal, monkeypatch):
    """Both workers have seen the cell free; the other one's attempt got the lower number."""
    one = opened(journal)
    look, looks = one._living, []

    def late(key):
        looks.append(key)
        if len(looks) == 1:
            found = look(key)
            foreign_claim(one)
            return found
        return look(key)

    monkeypatch.setattr(one, "_living", late)
    assert one.claim(CELL.key) is None
    states = [t.state for t in one._study.get_trials(deepcopy=False)]
    assert states == [TrialState.RUNNING, TrialState.FAIL]
