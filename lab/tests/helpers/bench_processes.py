"""Processes that stand in for those of cells: they end as a test wants, none of them trains for long."""

import json
import subprocess
import sys
import threading
from types import SimpleNamespace

from bench_results import cell, result, score, small_suite
from dynlora_lab.bench import worker
from dynlora_lab.bench.cell import run_spec
from dynlora_lab.bench.results import open_folder
from dynlora_lab.bench.worker import Bench


def shared(folder, suite=None, **fields):
    """What the workers of a bench share, its folder made."""
    suite = suite or small_suite()
    open_folder(folder, suite)
    about = {"suite": suite, "folder": folder, "command": "dynlora bench s.yaml"}
    return Bench(**{**about, "only": None, "stop": threading.Event(), **fields})


class Script:
    """A real process that runs ``code`` instead of a cell, with the interface of multiprocessing's.

    ``sys.argv[1:]`` of the code are the spec and the log.
    """

    def __init__(self, code, spec, log):
        self.command = [sys.executable, "-I", "-S", "-c", code, str(spec), str(log)]

    def start(self):
        self.process = subprocess.Popen(self.command)

    def is_alive(self):
        return self.process.poll() is None

    def join(self, timeout=None):
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()

    @property
    def exitcode(self):
        return self.process.returncode


class Here:
    """No process at all: ``action`` is done with the spec's path, and the cell has ended well."""

    exitcode = 0

    def __init__(self, action, spec):
        self.action, self.spec = action, spec

    def start(self):
        self.action(self.spec)

    def is_alive(self):
        return False

    def join(self, timeout=None):
        return


def run_scripts(monkeypatch, *codes):
    """Let the cells that begin be these scripts, one after another; the last one again and again."""
    waiting, lock = list(codes), threading.Lock()

    def process(*, target, args):
        with lock:
            code = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        return Script(code, *args[:2])

    _put(monkeypatch, process)


def run_here(monkeypatch, action=run_spec):
    """Let cells be run by ``action`` in the worker's own thread."""
    _put(monkeypatch, lambda *, target, args: Here(action, args[0]))


def write_made_up(spec_path):
    """The result that ``bench_results`` makes up for a cell."""
    spec = json.loads(spec_path.read_text(encoding="utf8"))
    one = cell(*(spec["cell"][k] for k in ("task", "method", "learning_rate", "seed")))
    with open(spec["result"], "w", encoding="utf8") as file:  # noqa: PTH123
        json.dump({**result(one, score(one)), "command": spec["command"]}, file)


def _put(monkeypatch, process):
    for name, seconds in (("POLL_S", 0.05), ("WAIT_S", 0.05)):
        monkeypatch.setattr(worker, name, seconds)
    monkeypatch.setattr(worker, "_CELLS", SimpleNamespace(Process=process))
