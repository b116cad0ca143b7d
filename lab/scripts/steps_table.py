"""Steps until a score, from the results of a suite whose runs were tested on the way.

python lab/scripts/steps_table.py lab/results/size-steps    # steps.md in that folder
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from dynlora_lab.bench.results import DONE, Result, read_results, read_suite_file
from dynlora_lab.bench.suite import Suite

NEVER = math.inf

Curve = list[tuple[int, float]]
"""Step and reported score at each test, in the suite's unit and higher for a better model."""


def curves(suite: Suite, results: Mapping[str, Result]) -> dict[tuple[str, str], list[Curve]]:
    """The runs of each task and method, one a seed."""
    found: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for result in results.values():
        cell = result["cell"]
        if result["status"] == DONE and cell["seed"] in suite.seeds:
            unit = suite.scale_of(cell["task"]) * (1 if result["is_better_higher"] else -1)
            points = [(entry["step"], unit * entry["reported"]) for entry in result["curve"]]
            found[cell["task"], cell["method"]].append(points)
    return found


def common_score(runs: Iterable[list[Curve]]) -> float:
    """What every method ends with at least: the lowest of their mean last scores."""
    return min(statistics.mean(curve[-1][1] for curve in method) for method in runs)


def steps_until(curve: Curve, score: float) -> float:
    """First step at whose test the score was reached, ``NEVER`` if it never was."""
    return next((step for step, value in curve if value >= score), NEVER)


def page(suite: Suite, results: Mapping[str, Result]) -> str:
    """The table as Markdown."""
    found = curves(suite, results)
    scores = {
        task: common_score(found[task, method] for method in suite.methods) for task in suite.tasks
    }
    base = {task: _median(found[task, suite.baseline], score) for task, score in scores.items()}
    headings = [f"{task} ({score:.2f})" for task, score in scores.items()]
    lines = [
        f"# Steps until a score: `{suite.name}`",
        "",
        "Written by `lab/scripts/steps_table.py` from the files in `cells/`; edit nothing here.",
        "",
        "Median over runs of the first step at whose test a run has the score in brackets, the lowest of "
        "the methods' mean last scores; how many runs never had it; then the mean of last scores.",
        "",
        f"| method | {' | '.join(headings)} | of {suite.baseline}'s |",
        "|---" * (len(suite.tasks) + 2) + "|",
    ]
    for method in suite.methods:
        cells, medians = [], []
        for task, score in scores.items():
            runs = found[task, method]
            missing = sum(steps_until(curve, score) == NEVER for curve in runs)
            last = statistics.mean(curve[-1][1] for curve in runs)
            never = f", {missing} never" if missing else ""
            middle = _median(runs, score)
            cells.append(f"{'-' if middle == NEVER else f'{middle:g}'}{never}; {last:.2f}")
            medians.append(middle)
        is_known = NEVER not in (*medians, *base.values())
        ratios = (m / b for m, b in zip(medians, base.values(), strict=True))
        share = f"{statistics.mean(ratios):.2f}" if is_known else "-"
        lines.append(f"| {method} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines) + "\n"


def _median(runs: list[Curve], score: float) -> float:
    """Of the steps of all runs, those that never had the score counted as the latest."""
    return statistics.median(steps_until(curve, score) for curve in runs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    text = page(read_suite_file(folder), read_results(folder))
    (folder / "steps.md").write_text(text, encoding="utf-8")
