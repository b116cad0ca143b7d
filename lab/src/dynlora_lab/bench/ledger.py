"""Who runs which cell: an Optuna study that workers share, in a file or in PostgreSQL."""

import json
import os
import random
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError, ProgrammingError

from dynlora_lab.bench.results import DONE, Result

LEASE_S = 180.0
"""A claim whose worker has not been heard of for so long is void; clocks may differ by a minute."""

MAX_DEATHS = 2
"""Attempts that may end without a word (killed, out of memory) before a cell counts as failed."""

MAX_RACES = 5  # for the tables of a new database


class Ledger:
    """Claims and results of a suite; one object a worker.

    An attempt at a cell is a trial of the study. To claim a cell a worker adds a running trial for it,
    then reads all trials: the lowest number among the living attempts wins, everybody else withdraws.
    Numbers are given by the storage in one order for all, so exactly one worker wins. Workers renew
    their claims; a claim that is not renewed, or whose process is gone from this machine, is void.

    Args:
        storage: URL of a database (``postgresql+psycopg://user@host/name``); None: the journal file.
        journal: path of the journal file.
        suite: name of the suite; the study's name.
    """

    def __init__(self, storage: str | None, journal: Path, suite: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=_storage(storage, journal),
            study_name=suite,
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )

    def claim(self, key: str) -> int | None:
        """Number of the attempt if this worker may run the cell ``key``, else None."""
        token = uuid.uuid4().hex
        attempt = create_trial(
            state=TrialState.RUNNING,
            user_attrs={
                "cell": key,
                "token": token,
                "alive": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "began": psutil.Process().create_time(),
            },
        )
        if self._living(key):
            return None
        self._study.add_trial(attempt)
        living = self._living(key)
        mine = next(t for t in living if t.user_attrs["token"] == token)
        if living[0].number == mine.number:
            self._void_the_dead(key)
            return mine.number
        self.give_up(mine.number)
        return None

    def renew(self, number: int) -> None:
        """Say that the worker of an attempt is alive."""
        self._note(number, "alive", time.time())

    def finish(self, number: int, result: Result) -> None:
        """End an attempt with the cell's result, done or failed."""
        self._note(number, "result", json.dumps(result))
        if result["status"] == DONE:
            self._study.tell(number, result["selected"]["final"], skip_if_finished=True)
        else:
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def give_up(self, number: int, *, died: bool = False) -> None:
        """End an attempt without a result; the cell is free again.

        Args:
            number: of the attempt.
            died: whether the run ended without a word, and not because its worker was stopped.
        """
        if died:
            self._note(number, "died", True)
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def deaths(self, key: str) -> int:
        """How many attempts at the cell died."""
        return sum(1 for t in self._attempts(key) if t.user_attrs.get("died"))

    def results(self, known: Mapping[str, Any]) -> dict[str, Result]:
        """Results in the ledger of cells that are not ``known``; those of other machines."""
        found = {}
        for trial in self._trials():
            key = trial.user_attrs.get("cell")
            if key not in known and "result" in trial.user_attrs:
                found[key] = json.loads(trial.user_attrs["result"])
        return found

    def running(self) -> set[str]:
        """Cells that some worker is at."""
        return {
            t.user_attrs["cell"]
            for t in self._trials()
            if t.state is TrialState.RUNNING and is_alive(t)
        }

    def forget(self, keys: Sequence[str]) -> None:
        """Take the results and deaths of cells back, so that they run again."""
        for key in keys:
            for trial in self._attempts(key):
                storage = self._study._storage  # a finished trial has no public way to be changed
                study_id = self._study._study_id
                storage.set_study_user_attr(study_id, f"forgotten-{trial.number}", True)

    def _trials(self) -> list[FrozenTrial]:
        forgotten = self._study.user_attrs
        return [
            t
            for t in self._study.get_trials(deepcopy=False)
            if f"forgotten-{t.number}" not in forgotten
        ]

    def _attempts(self, key: str) -> list[FrozenTrial]:
        return [t for t in self._trials() if t.user_attrs.get("cell") == key]

    def _living(self, key: str) -> list[FrozenTrial]:
        """Attempts that have a result or may still have one, in the order of their numbers."""
        living = [
            t
            for t in self._attempts(key)
            if "result" in t.user_attrs or (t.state is TrialState.RUNNING and is_alive(t))
        ]
        return sorted(living, key=lambda t: t.number)

    def _void_the_dead(self, key: str) -> None:
        for trial in self._attempts(key):
            if trial.state is TrialState.RUNNING and not is_alive(trial):
                self.give_up(trial.number)

    def _note(self, number: int, name: str, value: Any) -> None:
        trial = next(t for t in self._study.get_trials(deepcopy=False) if t.number == number)
        Trial(self._study, trial._trial_id).set_user_attr(name, value)  # no public way by number


def is_alive(trial: FrozenTrial) -> bool:
    """Whether the worker of a running attempt is heard of and, on this machine, exists."""
    attrs = trial.user_attrs
    if time.time() - attrs["alive"] > LEASE_S:
        return False
    if attrs["host"] != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(attrs["pid"]).create_time() - attrs["began"]) < 1
    except psutil.NoSuchProcess:
        return False


def _storage(url: str | None, journal: Path) -> BaseStorage:
    if url is None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(journal)))
    for _ in range(MAX_RACES):
        try:
            return RDBStorage(url)
        except (IntegrityError, ProgrammingError):  # another worker makes the tables just now
            time.sleep(random.uniform(0.5, 2))  # noqa: S311 (no secret)
    return RDBStorage(url)
