"""The process of one cell: runs it and writes its result."""

import json
import multiprocessing
import os
import resource
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dynlora_lab.bench.results import DONE, Result
from dynlora_lab.tasks.recipe import Recipe, recipe_from
from dynlora_lab.tasks.run import run
from dynlora_lab.tasks.run_files import read_run
from dynlora_lab.tasks.whole_file import write_json

KEPT = (
    "steps",
    "budget",
    "ranks",
    "train_s",
    "versions",
    "commit",
    "machine",
    "base_sha256",
    "baselines",
    "forgetting",
)


def run_cell(spec_path: Path, log: Path, environment: Mapping[str, str]) -> None:
    """Run what the spec says, in a process that does nothing else; an error ends it with its traceback.

    Args:
        spec_path: JSON file; see :func:`run_spec`.
        log: file that takes what the run prints.
        environment: variables to set before anything is computed.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the bench, which ends its cells
    with log.open("w", encoding="utf8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # torch has read the variable before
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    run_spec(spec_path)


def run_spec(path: Path) -> None:
    """Run a cell in this process and write its result.

    Args:
        path: JSON file with the recipe, the sets that select and report, and where the result goes.
    """
    spec = json.loads(path.read_text(encoding="utf8"))
    started = datetime.now(UTC).isoformat(timespec="seconds")
    recipe = recipe_from(spec["recipe"])
    run(recipe)
    record = read_run(recipe.output)
    result = cell_result(recipe, record, select=spec["select"], report=spec["report"])
    used = resource.getrusage(resource.RUSAGE_SELF)
    result |= {"started": started, "cpu_s": round(used.ru_utime + used.ru_stime, 1)}
    result |= {"peak_memory_bytes": _peak_memory_bytes()}
    result |= {"cell": spec["cell"], "command": spec["command"]}
    write_json(Path(spec["result"]), result)


def cell_result(
    recipe: Recipe, record: Mapping[str, Any], *, select: str, report: Sequence[str]
) -> Result:
    """What the tables need from the record of a run.

    Args:
        recipe: of the run.
        record: content of its ``run.json``.
        select: evaluation set that chose the best epoch.
        report: evaluation sets to show, averaged.

    Returns:
        ``selected`` and ``reported`` hold the metric after the last epoch (``final``) and at the epoch
        that was best on ``select`` among those within the final budget (``best``, None if there was
        none); ``curve`` holds both at every evaluation; ``cuts``, if any, metric and loss of each.
    """
    metric = record["metric"].removeprefix(f"eval_{select}_")

    def value(entry: Mapping[str, Any], sets: Sequence[str], of: str = metric) -> float:
        return float(sum(entry[f"eval_{name}_{of}"] for name in sets) / len(sets))

    final, best = record["metrics"], record["best"]
    plain = recipe.to_dict()
    plain.pop("output")
    cuts = [
        {
            **{name: cut[name] for name in ("order", "rank", "parameters")},
            "selected": value(cut, [select]),
            "reported": value(cut, report),
            "selected_loss": value(cut, [select], "loss"),
            "reported_loss": value(cut, report, "loss"),
        }
        for cut in record.get("cuts", ())
    ]
    return {
        "status": DONE,
        "metric": metric,
        "is_better_higher": recipe.family.is_better_higher(recipe.options),
        "selected": {"final": value(final, [select]), "best": best and value(best, [select])},
        "reported": {"final": value(final, report), "best": best and value(best, report)},
        "best_step": best and best["step"],
        "curve": [
            {"step": e["step"], "selected": value(e, [select]), "reported": value(e, report)}
            for e in record["evaluations"]
            if f"eval_{select}_{metric}" in e
        ],
        "recipe": json.loads(json.dumps(plain, default=str)),
        **{name: record.get(name) for name in KEPT},
        **({"cuts": cuts} if cuts else {}),
    }


def _peak_memory_bytes() -> dict[str, int]:
    """Largest resident memory of this process and, with CUDA, what torch allocated at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = int(torch.cuda.max_memory_allocated())
    return peak


def _end_with_parent() -> None:
    """A worker that was killed must not leave its cell running beside the one that replaces it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
