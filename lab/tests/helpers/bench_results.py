"""Made-up results of a small suite, as the cells would leave them."""

from dynlora_lab.bench.plan import wanted_cells
from dynlora_lab.bench.results import DONE, FAILED, open_folder, write_result
from dynlora_lab.bench.suite import Cell, suite_from

SCORES = {"lora": {0.001: 0.70, 0.01: 0.80}, "dynlora": {0.001: 0.60, 0.01: 0.85}}
"""Accuracy on the selection set by method and learning rate; seeds add to it."""


def small_suite(**fields):
    values = {
        "name": "small",
        "tasks": {"a": {}, "b": {}},
        "methods": {"lora": {"method": "lora"}, "dynlora": {"method": "dynlora"}},
        "learning_rates": [0.01, 0.001],
        "seeds": [0, 1, 2],
        "published": {"source": "a paper", "values": {"dynlora": {"a": 90.5}}},
    }
    return suite_from({**values, **fields})


def cell(task, method, rate, seed):
    return Cell(task=task, method=method, learning_rate=rate, seed=seed)


def result(cell, selected, *, reported=None, is_better_higher=True):
    """A finished cell; the reported score is one point below the selecting one unless it is given."""
    reported = selected - 0.01 if reported is None else reported
    return {
        "format": 1,
        "status": DONE,
        "cell": vars(cell) | {"key": cell.key},
        "command": f"dynlora bench small.yaml --cell {cell.key}",
        "metric": "accuracy",
        "is_better_higher": is_better_higher,
        "selected": {"final": selected, "best": selected + 0.02},
        "reported": {"final": reported, "best": reported + 0.01},
        "best_step": 30,
        "curve": [{"step": 40, "selected": selected, "reported": reported}],
        "recipe": {},
        "steps": 40,
        "budget": {"parameters_start": 300, "parameters_end": 200},
        "ranks": {"q": 2},
        "train_s": 10.0 + cell.seed,
        "wall_s": 12.0,
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
        "machine": {"processor": "a processor", "accelerator": None, "threads": 1},
        "baselines": {"accuracy": 0.25},
        "started": "2026-11-24T20:00:00+00:00",
        "peak_memory_bytes": {"process": 2**30},
    }


def failed(cell):
    return {
        "format": 1,
        "status": FAILED,
        "error": "FloatingPointError: NaN",
        "cell": vars(cell) | {"key": cell.key},
        "wall_s": 3.0,
    }


def score(cell):
    """What the made-up methods reach: b is harder than a, later seeds are luckier."""
    return (
        SCORES[cell.method].get(cell.learning_rate, 0.5)
        + 0.01 * cell.seed
        - 0.1 * (cell.task == "b")
    )


def run_all(suite, run=lambda c: result(c, score(c))):
    """Results of a suite run to its end, and the order in which cells became due."""
    results, order = {}, []
    while due := [c for c in wanted_cells(suite, results) if c.key not in results]:
        results[due[0].key] = run(due[0])
        order.append(due[0])
    return results, order


def finished(folder, suite=None, run=lambda c: result(c, score(c))):
    """A results folder of a suite that has run to its end."""
    suite = suite or small_suite()
    open_folder(folder, suite)
    for key, found in run_all(suite, run)[0].items():
        write_result(folder, key, found)
    return folder
