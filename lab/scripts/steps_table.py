"""Steps until a score, from the results of a suite whose runs were tested on the way.

python lab/scripts/steps_table.py lab/results/size-steps    # steps.md in that folder
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynlora_lab.bench.results import DONE, Result, read_results, read_suite_file
from dynlora_lab.bench.suite import Suite

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


def steps_until(curve: Curve, score: float) -> int | None:
    """First step at whose test the score was reached, None if it never was."""
    return next((step for step, value in curve if value >= score), None)


def page(suite: Suite, results: Mapping[str, Result]) -> str:
    """The table as Markdown."""
    found = curves(suite, results)
    headings = [_heading(task, suite, found) for task in suite.tasks]
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
        cells, ratios = [], []
        for task in suite.tasks:
            score = common_score(found[task, name] for name in suite.methods)
            mine, base = (_steps(found[task, name], score) for name in (method, suite.baseline))
            missing = sum(step is None for step in mine)
            last = statistics.mean(curve[-1][1] for curve in found[task, method])
            never = f", {missing} never" if missing else ""
            middle = _median(mine)
            cells.append(f"{'-' if middle is None else f'{middle:g}'}{never}; {last:.2f}")
            if middle is not None and (of_base := _median(base)) is not None:
                ratios.append(middle / of_base)
        share = f"{statistics.mean(ratios):.2f}" if len(ratios) == len(suite.tasks) else "-"
        lines.append(f"| {method} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines) + "\n"


def _heading(task: str, suite: Suite, found: Mapping[tuple[str, str], list[Curve]]) -> str:
    return f"{task} ({common_score(found[task, name] for name in suite.methods):.2f})"


def _steps(runs: list[Curve], score: float) -> list[int | None]:
    return [steps_until(curve, score) for curve in runs]


def _median(steps: list[Any]) -> float | None:
    """Of all runs, those that never had the score counted as the latest; None if it is one of these."""
    middle = statistics.median(float("inf") if step is None else step for step in steps)
    return None if middle == float("inf") else middle


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    text = page(read_suite_file(folder), read_results(folder))
    (folder / "steps.md").write_text(text, encoding="utf-8")
