"""Write the README of a suite of sizes that was cut off: its tables have the seeds that every method has.

python lab/scripts/size_table.py lab/results/size-vision
"""

import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Run:
    """What the tables need of one cell; scores in points."""

    selected: float
    reported: float
    size: int
    cpu: float


Runs = dict[tuple[str, str, float], dict[int, Run]]
"""By method, task and learning rate, and in each by seed."""


def main(folder: Path) -> None:
    """Read the cells and write the tables."""
    found: Runs = defaultdict(dict)
    for file in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        key = cell["cell"]
        found[key["method"], key["task"], key["learning_rate"]][key["seed"]] = Run(
            100 * cell["selected"]["final"],
            100 * cell["reported"]["final"],
            cell["budget"]["parameters_end"],
            cell["cpu_s"],
        )
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    found = {key: {seed: runs[seed] for seed in seeds} for key, runs in found.items()}
    rates = sorted({rate for _, _, rate in found})
    full = max(run.size for runs in found.values() for run in runs.values())
    text = (
        f"# Results of the suite `{folder.name}`, cut off\n\n"
        "Written by `lab/scripts/size_table.py` from the files in `cells/`; edit nothing here.\n\n"
        f"Means over seeds {', '.join(map(str, seeds))}, the ones that all methods have. The learning rate "
        f"of each method and task is the better of {', '.join(map(str, rates))} on the selecting set. Size "
        f"is the share of {full:,} parameters.\n\n" + "\n".join(score_table(found, full)) + "\n\n"
        "## Against a LoRA of the run's own final size\n\n"
        "Each run minus the LoRAs of the same task and seed, interpolated between the two ranks around "
        "its size, on a logarithmic scale of sizes. Once all LoRAs have the learning rate of the run, once "
        "each rank has the better of its own. Wins and losses are runs.\n\n"
        + "\n".join(difference_table(found))
        + "\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def score_table(found: Runs, full: int) -> list[str]:
    """Score, size and time of each method, at the learning rate that the selecting set prefers."""
    methods, tasks = (sorted({key[i] for key in found}) for i in range(2))
    rows = []
    for method in methods:
        best = [found[method, task, best_rate(found, method, task)].values() for task in tasks]
        scores = [statistics.mean(r.reported for r in runs) for runs in best]
        size = statistics.mean(statistics.mean(r.size for r in runs) / full for runs in best)
        cpu = statistics.mean(statistics.mean(r.cpu for r in runs) for runs in best)
        cells = [f"{score:.1f}" for score in (*scores, statistics.mean(scores))]
        rows.append((size, f"| {' | '.join([method, *cells, f'{size:.2f}', f'{cpu:.0f}'])} |"))
    head = ["method", *(f"{task} (accuracy)" for task in tasks), "mean", "size", "CPU seconds"]
    lines = [line for _, line in sorted(rows, reverse=True)]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]


def difference_table(found: Runs) -> list[str]:
    """Each method that is no LoRA of one rank against LoRAs of its final size."""
    tasks = sorted({task for _, task, _ in found})
    methods = sorted({method for method, _, _ in found if not method.startswith("lora-r")})
    head = ["method", "LoRAs at", *(f"{task} (points)" for task in tasks), "mean", "wins:losses"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method in methods:
        for is_tuned in (False, True):
            groups = [differences(found, method, task, is_tuned=is_tuned) for task in tasks]
            means = [statistics.mean(group) for group in groups]
            every = [difference for group in groups for difference in group]
            counts = f"{sum(d > 0 for d in every)}:{sum(d < 0 for d in every)}"
            cells = [f"{mean:+.1f}" for mean in (*means, statistics.mean(means))]
            which = "their own rate" if is_tuned else "its rate"
            lines.append(f"| {' | '.join([method, which, *cells, counts])} |")
    return lines


def differences(found: Runs, method: str, task: str, *, is_tuned: bool) -> list[float]:
    """A method's runs at its best rate minus the LoRAs of their sizes, seed by seed, in points."""
    rate = best_rate(found, method, task)
    ranks = sorted({name for name, _, _ in found if name.startswith("lora-r")})
    result = []
    for seed, run in found[method, task, rate].items():
        loras = [
            found[name, task, best_rate(found, name, task) if is_tuned else rate][seed]
            for name in ranks
        ]
        loras.sort(key=lambda r: r.size)
        sizes = np.log([r.size for r in loras])
        result.append(
            run.reported - float(np.interp(np.log(run.size), sizes, [r.reported for r in loras]))
        )
    return result


def best_rate(found: Runs, method: str, task: str) -> float:
    """The learning rate whose mean on the selecting set is highest."""
    rates = [rate for name, of, rate in found if (name, of) == (method, task)]
    return max(
        rates, key=lambda r: statistics.mean(x.selected for x in found[method, task, r].values())
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
