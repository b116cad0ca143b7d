"""From results files to numbers: plain values, nothing else is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dynlora_lab.bench.plan import chosen_rate, num_cells, wanted_cells
from dynlora_lab.bench.results import DONE, Result, check_one_base, read_results, read_suite_file
from dynlora_lab.bench.statistics import paired, ranking, spread
from dynlora_lab.bench.suite import Cell, Suite

KINDS = ("final", "best")


def summarise(folder: Path) -> dict[str, Any]:
    """Everything that the tables show, from the files in a results folder.

    Returns:
        suite, baseline, cells (done, failed, planned), tasks (name, metric, is_better_higher, scale,
        baselines), methods, rows (task by method), overall (by method), duels (method by method,
        over all tasks), ranking, sweep (value by learning rate), provenance. Scores are multiplied by the
        task's scale; differences are positive where a method is better than the baseline, or than the
        other one, of the last epoch. A row has ``forgetting``, nats a token, where its cells measured it.

    Raises:
        RecipeError: ``folder`` holds no results, or cells of one task that started from different bases.
    """
    suite, results = read_suite_file(folder), read_results(folder)
    check_one_base(results)
    wanted = {cell.key for cell in wanted_cells(suite, results)}
    used = {key: result for key, result in results.items() if key in wanted}
    done = {key: result for key, result in used.items() if result["status"] == DONE}
    rows = [_row(suite, used, task, method) for task in suite.tasks for method in suite.methods]
    tasks = [_task(suite, done, task) for task in suite.tasks]
    signs = {task["name"]: 1 if task["is_better_higher"] else -1 for task in tasks}
    return {
        "suite": suite.name,
        "baseline": suite.baseline,
        "select": suite.select,
        "seeds": suite.seeds,
        "cells": {
            "done": len(done),
            "failed": len(used) - len(done),
            "planned": num_cells(suite, used),
            "failures": {k: r["error"] for k, r in used.items() if r["status"] != DONE},
        },
        "tasks": tasks,
        "methods": list(suite.methods),
        "rows": rows,
        "overall": [_overall(suite, used, rows, method) for method in suite.methods],
        "duels": _duels(suite, used),
        "ranking": _ranking(suite, rows, signs),
        "sweep": _sweep(suite, done),
        "published": suite.published,
        "provenance": _provenance(done),
    }


def _row(suite: Suite, results: Mapping[str, Result], task: str, method: str) -> dict[str, Any]:
    """One method on one task, at the learning rate that its sweep chose."""
    found = _by_seed(suite, results, task, method)
    published = suite.published.get("values", {}).get(method, {}).get(task)
    row: dict[str, Any] = {"task": task, "method": method, "published": published}
    row |= {"learning_rate": chosen_rate(suite, results, task, method), "seeds": sorted(found)}
    scale = suite.scale_of(task)
    for kind in KINDS:
        values = [
            scale * r["reported"][kind] for r in found.values() if r["reported"][kind] is not None
        ]
        mean, deviation = spread(values) if values else (None, None)
        row |= {kind: mean, f"{kind}_std": deviation}
    differences = _differences(suite, results, task, method, suite.baseline)
    row["difference"] = asdict(paired([differences])) if differences else None
    row["cost"] = _cost(found)
    row["modules_by_rank"] = _modules_by_rank(found)
    row |= _forgetting(found)
    return row


def _overall(
    suite: Suite, results: Mapping[str, Result], rows: list[dict[str, Any]], method: str
) -> dict[str, Any]:
    """One method over the tasks that it and the baseline have."""
    mine = [r for r in rows if r["method"] == method and r["final"] is not None]
    groups = _groups(suite, results, method, suite.baseline)
    return {
        "method": method,
        "tasks": len(mine),
        "is_complete": len(mine) == len(suite.tasks),
        "final": fmean(r["final"] for r in mine) if mine else None,
        "difference": asdict(paired(groups)) if groups else None,
    }


def _duels(suite: Suite, results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Each method against each other one, over the tasks and seeds that both have."""
    return [
        {"method": method, "against": other, "difference": asdict(paired(groups))}
        for method in suite.methods
        for other in suite.methods
        if (groups := _groups(suite, results, method, other))
    ]


def _groups(
    suite: Suite, results: Mapping[str, Result], method: str, other: str
) -> list[list[float]]:
    groups = [_differences(suite, results, task, method, other) for task in suite.tasks]
    return [group for group in groups if group]


def _by_seed(
    suite: Suite, results: Mapping[str, Result], task: str, method: str
) -> dict[int, Result]:
    rate = chosen_rate(suite, results, task, method)
    if rate is None:
        return {}
    keys = {
        seed: Cell(task=task, method=method, learning_rate=rate, seed=seed).key
        for seed in suite.seeds
    }
    return {
        seed: results[key]
        for seed, key in keys.items()
        if key in results and results[key]["status"] == DONE
    }


def _differences(
    suite: Suite, results: Mapping[str, Result], task: str, method: str, other: str
) -> list[float]:
    """Method minus the other one after the last epoch, seed by seed; [] for one and the same."""
    if method == other:
        return []
    mine = _by_seed(suite, results, task, method)
    base = _by_seed(suite, results, task, other)
    both = [seed for seed in mine if seed in base]
    return [
        suite.scale_of(task)
        * (mine[s]["reported"]["final"] - base[s]["reported"]["final"])
        * (1 if mine[s]["is_better_higher"] else -1)
        for s in both
    ]


def _cost(found: Mapping[int, Result]) -> dict[str, float] | None:
    """Means over seeds: parameters of the adapter without the head, seconds of training, peak memory."""
    if not found:
        return None
    runs = list(found.values())
    return {
        "parameters_start": fmean(r["budget"]["parameters_start"] for r in runs),
        "parameters_end": fmean(r["budget"]["parameters_end"] for r in runs),
        "train_s": fmean(r["train_s"] for r in runs),
        "peak_mib": fmean(_peak(r) for r in runs) / 2**20,
    }


def _forgetting(found: Mapping[int, Result]) -> dict[str, float]:
    """By how much the loss on data of the base's own domain grew, mean over seeds; {} if unmeasured."""
    measured = [r["forgetting"] for r in found.values() if r.get("forgetting")]
    if not measured:
        return {}
    return {"forgetting": fmean(m["after"] - m["before"] for m in measured)}


def _modules_by_rank(found: Mapping[int, Result]) -> dict[str, float] | None:
    """How many modules ended at each rank, mean over seeds; None for a method without ranks."""
    counts = [Counter(r["ranks"].values()) for r in found.values() if r["ranks"]]
    if not counts:
        return None
    ranks = sorted(set().union(*counts))
    return {str(rank): fmean(count[rank] for count in counts) for rank in ranks}


def _peak(result: Result) -> float:
    memory = result["peak_memory_bytes"]
    return float(memory.get("cuda", memory["process"]))


def _ranking(
    suite: Suite, rows: list[dict[str, Any]], signs: Mapping[str, int]
) -> dict[str, Any] | None:
    """Over the tasks that every method with a score has; None while there are too few."""
    score = {(r["task"], r["method"]): r for r in rows if r["final"] is not None}
    methods = [m for m in suite.methods if any((t, m) in score for t in suite.tasks)]
    tasks = [t for t in suite.tasks if all((t, m) in score for m in methods)]
    ranked = ranking({m: [signs[t] * score[t, m]["final"] for t in tasks] for m in methods})
    return asdict(ranked) if ranked else None


def _sweep(suite: Suite, done: Mapping[str, Result]) -> list[dict[str, Any]]:
    """What the choice of the learning rate saw: mean on the selection set, by rate."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for result in done.values():
        cell = result["cell"]
        if cell["seed"] in suite.tune_seeds:
            place = (cell["task"], cell["method"], cell["learning_rate"])
            value = suite.scale_of(cell["task"]) * result["selected"]["final"]
            found.setdefault(place, []).append(value)
    return [
        {"task": t, "method": m, "learning_rate": rate, "selected": fmean(values)}
        for (t, m, rate), values in sorted(found.items())
    ]


def _task(suite: Suite, done: Mapping[str, Result], task: str) -> dict[str, Any]:
    mine = [r for r in done.values() if r["cell"]["task"] == task]
    first = mine[0] if mine else None
    return {
        "name": task,
        "scale": suite.scale_of(task),
        "reported": suite.reported(task),
        "metric": first and first["metric"],
        "is_better_higher": first["is_better_higher"] if first else True,
        "without_a_model": first
        and {k: suite.scale_of(task) * v for k, v in (first["baselines"] or {}).items()},
    }


def _provenance(done: Mapping[str, Result]) -> dict[str, Any]:
    """What computed: every version, commit and machine that occurs."""
    runs = list(done.values())
    machines = {
        f"{r['machine']['accelerator'] or r['machine']['processor']}, {r['machine']['threads']} threads"
        for r in runs
    }
    packages = sorted({name for r in runs for name in r["versions"]})
    return {
        "machines": sorted(machines),
        "commits": sorted({str(r["commit"]) for r in runs}),
        "versions": {p: sorted({r["versions"].get(p, "none") for r in runs}) for p in packages},
        "from": min((r["started"] for r in runs), default=None),
        "to": max((r["started"] for r in runs), default=None),
        "cell_hours": round(sum(r["wall_s"] for r in runs) / 3600, 2),
    }
