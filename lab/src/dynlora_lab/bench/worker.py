"""Workers: each claims a cell, runs it in a process of its own, keeps the result, and goes on."""

import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from dynlora_lab.bench.cell import run_cell
from dynlora_lab.bench.claims import claimed, has_died
from dynlora_lab.bench.plan import source_of, wanted_cells
from dynlora_lab.bench.results import FAILED, WORK, Result, read_results, write_result
from dynlora_lab.bench.suite import Cell, Suite

POLL_S = 0.5
WAIT_S = 2.0  # where all due cells are with other workers, whose results may make more due
STOP_S = 10.0  # a cell's process has so long to end when it is asked to

# On Linux cells are forked from a server that has imported everything and computed nothing: seconds saved
# a cell, and all cells of a bench run the code that was there when it began.
_CELLS: ForkServerContext | SpawnContext = (
    multiprocessing.get_context("forkserver")
    if sys.platform == "linux"
    else multiprocessing.get_context("spawn")
)
_CELLS.set_forkserver_preload(["dynlora_lab.bench.cell"])


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one worker computes on.

    Attributes:
        name: for people.
        environment: variables of its cells' processes, over those of this one.
    """

    name: str
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who is told by the workers; called from their threads.

    Attributes:
        on_start: (cell, slot name) when a cell begins.
        on_end: (cell, result, seconds) when it has ended; None for one that was stopped or died.
    """

    on_start: Callable[[Cell, str], None] = lambda _cell, _slot: None
    on_end: Callable[[Cell, Result | None, float], None] = lambda _cell, _result, _seconds: None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all workers of a process share.

    Attributes:
        suite: the cells.
        folder: of the results.
        command: what a reader types to run the suite again.
        only: keys of the cells to run; None: all.
        stop: set to end the workers.
    """

    suite: Suite
    folder: Path
    command: str
    only: frozenset[str] | None
    stop: threading.Event

    def due(self, results: Mapping[str, Result]) -> list[Cell]:
        """Cells that are wanted and not finished."""
        wanted = wanted_cells(self.suite, results)
        return [
            c for c in wanted if c.key not in results and (self.only is None or c.key in self.only)
        ]


def slots(*, devices: list[str], workers: int, threads: int | None) -> list[Slot]:
    """One slot per device, or ``workers`` of them without.

    >>> [s.environment for s in slots(devices=["0", "3"], workers=1, threads=None)]
    [{'CUDA_VISIBLE_DEVICES': '0'}, {'CUDA_VISIBLE_DEVICES': '3'}]
    """
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    if devices:
        return [
            Slot(name=f"device {d}", environment={"CUDA_VISIBLE_DEVICES": d, **limit})
            for d in devices
        ]
    return [Slot(name=f"worker {i}", environment=limit) for i in range(workers)]


def run_workers(bench: Bench, places: list[Slot], listener: Listener) -> None:
    """Run all that is due, one thread per slot; returns when nothing is, or when ``stop`` is set.

    Raises:
        RuntimeError: a worker failed (not a cell: a cell that fails has a result).
    """
    with ThreadPoolExecutor(len(places)) as pool:
        running = [pool.submit(_work, bench, slot, listener) for slot in places]
        pending = set(running)
        while pending:
            ended, pending = wait(pending, timeout=0.2)  # in slices, so that Ctrl-C is heard
            if any(worker.exception() for worker in ended):
                bench.stop.set()
    failures = [error for worker in running if (error := worker.exception())]
    if failures:
        raise RuntimeError(f"a worker failed: {failures[0]}") from failures[0]


def log_of(folder: Path, key: str) -> Path:
    """Where the output of a cell that failed is kept."""
    return folder / WORK / f"{key}.log"


def _work(bench: Bench, slot: Slot, listener: Listener) -> None:
    while not bench.stop.is_set():
        due = bench.due(read_results(bench.folder))
        if not due:
            return
        for cell in due:
            with claimed(bench.folder, cell.key) as is_ours:
                if is_ours:
                    _run_claimed(bench, slot, listener, cell)
                    break
        else:
            bench.stop.wait(WAIT_S)


def _run_claimed(bench: Bench, slot: Slot, listener: Listener, cell: Cell) -> None:
    """Run the cell and keep its result, if it has one."""
    listener.on_start(cell, slot.name)
    began = time.perf_counter()
    result = None
    try:
        result = _outcome(bench, slot, cell)
        if result is not None:
            result["wall_s"] = round(time.perf_counter() - began, 3)
            write_result(bench.folder, cell.key, result)
    finally:
        listener.on_end(cell, result, time.perf_counter() - began)


def _outcome(bench: Bench, slot: Slot, cell: Cell) -> Result | None:
    """The result of the cell's process; None if it was stopped or died and may be tried again."""
    with tempfile.TemporaryDirectory(dir=bench.folder / WORK, prefix="cell-") as scratch:
        place = Path(scratch)
        target = place / "result.json"
        _write_spec(bench, cell, place, target)
        log = place / "log.txt"
        code = _run_process(place / "spec.json", slot, log, bench.stop)
        if target.is_file():  # whole, and the last thing a cell does, however its process ended
            result: Result = json.loads(target.read_text(encoding="utf8"))
            return result
        if bench.stop.is_set():
            return None
        log.touch()  # of a process that ended before it had begun
        text = log.read_text(encoding="utf8", errors="replace")
        shutil.copy(log, log_of(bench.folder, cell.key))
    if code < 0 and not has_died(bench.folder, cell.key):
        return None
    last = (text.strip().splitlines() or ["no message"])[-1]
    reason = f"ended by signal {-code}" if code < 0 else last
    described = vars(cell) | {"key": cell.key}
    return {"status": FAILED, "error": reason, "cell": described, "command": _command(bench, cell)}


def _write_spec(bench: Bench, cell: Cell, place: Path, target: Path) -> None:
    spec = {
        "recipe": bench.suite.recipe(cell, place / "run", ranks=_ranks_for(bench, cell)),
        "select": bench.suite.select,
        "report": bench.suite.reported(cell.task),
        "cell": vars(cell) | {"key": cell.key},
        "command": _command(bench, cell),
        "result": str(target),
    }
    (place / "spec.json").write_text(json.dumps(spec), encoding="utf8")


def _ranks_for(bench: Bench, cell: Cell) -> dict[str, int] | None:
    """The ranks that the cell takes from another one; files are read only where it takes any."""
    if "ranks_of" not in bench.suite.methods[cell.method]:
        return None
    results = read_results(bench.folder)
    source = source_of(bench.suite, results, cell)
    return None if source is None else results[source.key]["ranks"]


def _command(bench: Bench, cell: Cell) -> str:
    return f"{bench.command} --cell {cell.key}"


def _run_process(spec: Path, slot: Slot, log: Path, stop: threading.Event) -> int:
    """Exit code of the cell's process."""
    process = _CELLS.Process(target=run_cell, args=(spec, log, dict(slot.environment)))
    process.start()
    try:
        while process.is_alive() and not stop.is_set():
            process.join(POLL_S)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(STOP_S)
        if process.is_alive():
            process.kill()
        process.join()
    return process.exitcode or 0
