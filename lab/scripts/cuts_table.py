"""What is left of one LoRA at smaller sizes, from the results of a suite of method `lora-cuts`.

python lab/scripts/cuts_table.py lab/results/size-cuts    # cuts.md and cuts.png in that folder
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_lab.bench.results import DONE, Result, read_results, read_suite_file
from dynlora_lab.bench.statistics import Difference, mean_text, paired
from dynlora_lab.bench.suite import Suite

TOLERANCES = (0.003, 0.01, 0.03)
"""Shares of the gain in loss on the selecting set that may be lost."""

EITHER = "the better on the selecting set"


class Cuts:
    """Cuts of a suite's runs, by task and seed; the whole adapter is the one of the starting rank."""

    def __init__(self, suite: Suite, results: Mapping[str, Result]) -> None:
        self.suite = suite
        self.runs: dict[str, dict[int, Result]] = defaultdict(dict)
        for result in results.values():
            if result["status"] == DONE:
                self.runs[result["cell"]["task"]][result["cell"]["seed"]] = result
        self.tasks = [task for task in suite.tasks if task in self.runs]
        first = next(iter(self.runs[self.tasks[0]].values()))
        self.orders = list(dict.fromkeys(cut["order"] for cut in first["cuts"]))
        self.ranks = list(dict.fromkeys(cut["rank"] for cut in first["cuts"]))

    def above_whole(self, task: str, result: Result, cut: Mapping[str, Any]) -> float:
        """Score minus that of the whole adapter of the run, in the suite's unit, positive if better."""
        sign = 1 if result["is_better_higher"] else -1
        difference: float = cut["reported"] - result["reported"]["final"]
        return sign * self.suite.scale_of(task) * difference

    def differences(self, pick: Any) -> list[list[float]]:
        """``above_whole`` of the cut that ``pick`` chooses of a run, by task and seed."""
        return [
            [
                self.above_whole(task, run, pick(run["cuts"]))
                for _, run in sorted(self.runs[task].items())
            ]
            for task in self.tasks
        ]

    def share(self, pick: Any) -> float:
        """Parameters of the cuts chosen, as a share of the whole's, mean of tasks and seeds."""
        runs = [run for task in self.tasks for run in self.runs[task].values()]
        return statistics.mean(
            pick(run["cuts"])["parameters"] / run["budget"]["parameters_start"] for run in runs
        )


def at(order: str, rank: float) -> Any:
    """Chooses the cut of an order and a rank, or of either order."""

    def pick(cuts: list[dict[str, Any]]) -> dict[str, Any]:
        found = [c for c in cuts if c["rank"] == rank and order in (EITHER, c["order"])]
        return min(found, key=lambda cut: cut["selected_loss"])

    return pick


def within(order: str, tolerance: float, rank: float) -> Any:
    """Chooses the smallest cut whose loss on the selecting set is within a tolerance, much as ``auto``.

    ``rank`` is the largest there is among the cuts, taken where none is within it.
    """

    def pick(cuts: list[dict[str, Any]]) -> dict[str, Any]:
        lowest = min(c["selected_loss"] for c in cuts)
        without = next(c["selected_loss"] for c in cuts if c["rank"] == 0)
        limit = lowest + tolerance * (without - lowest)
        fit = [c for c in cuts if order in (EITHER, c["order"]) and c["selected_loss"] <= limit]
        chosen: dict[str, Any] = min(
            fit or [at(order, rank)(cuts)], key=lambda c: (c["parameters"], c["selected_loss"])
        )
        return chosen

    return pick


def page(cuts: Cuts) -> str:
    """Tables of cuts by size, and of cuts by tolerance."""
    seeds = sorted({seed for runs in cuts.runs.values() for seed in runs})
    rows = [
        (f"rank {rank:g}", order, at(order, rank))
        for rank in cuts.ranks
        if rank
        for order in (*cuts.orders, EITHER)
    ]
    largest = max(cuts.ranks)
    rules = [
        (f"{tolerance:.1%}", order, within(order, tolerance, largest))
        for tolerance in TOLERANCES
        for order in (*cuts.orders, EITHER)
    ]
    gains = [
        (
            f"rank {rank:g}",
            _difference(paired(_minus(cuts, at("curvature", rank), at("singular values", rank)))),
        )
        for rank in cuts.ranks
        if rank
    ]
    return (
        f"# One LoRA at many sizes: `{cuts.suite.name}`\n\n"
        "Written by `lab/scripts/cuts_table.py` from the files in `cells/`; edit nothing here.\n\n"
        f"Seeds {', '.join(map(str, seeds))}. Each number is the score of a cut minus that of the "
        "whole adapter of the same run, positive where the cut is better; the mean of tasks has the 95 % "
        "bootstrap interval over runs. Size is a share of the parameters.\n\n## At a size\n\n"
        + "\n".join(_table(cuts, "size of", rows))
        + "\n\n## Curvature minus singular values, at the same size\n\n"
        + "| size of | mean of tasks |\n|---|---|\n"
        + "\n".join(f"| {name} | {text} |" for name, text in gains)
        + "\n\n## Within a tolerance\n\nThe smallest of these sizes whose loss on the selecting set is "
        "within the tolerance of the lowest of all cuts: a share of what is gained there.\n\n"
        + "\n".join(_table(cuts, "tolerance", rules))
        + "\n"
    )


def _minus(cuts: Cuts, one: Any, other: Any) -> list[list[float]]:
    pairs = zip(cuts.differences(one), cuts.differences(other), strict=True)
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]


def _table(cuts: Cuts, head: str, rows: list[tuple[str, str, Any]]) -> list[str]:
    heads = [head, "order", *cuts.tasks, "mean", "size"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, order, pick in rows:
        groups = cuts.differences(pick)
        cells = [f"{statistics.mean(group):+.2f}" for group in groups]
        found = [name, order, *cells, _difference(paired(groups)), f"{cuts.share(pick):.2f}"]
        lines.append(f"| {' | '.join(found)} |")
    return lines


def _difference(found: Difference) -> str:
    return mean_text(found.mean, found.interval)


def picture(cuts: Cuts, path: Path) -> None:
    """Score minus the whole adapter's against size, a line for each order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(cuts.tasks))
    rows = -(-len(cuts.tasks) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.6 * columns, 2.9 * rows + 0.5),
        layout="constrained",
        squeeze=False,
    )
    ranks = [rank for rank in cuts.ranks if rank]
    for place, (ax, task) in enumerate(zip(axes.flat, cuts.tasks, strict=False)):
        for order, mark in zip(cuts.orders, ("o-", "s-"), strict=True):
            means = [statistics.mean(cuts.differences(at(order, rank))[place]) for rank in ranks]
            ax.plot(ranks, means, mark, label=order)
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ranks, [f"{rank:g}" for rank in ranks], fontsize=8)
        ax.minorticks_off()
        ax.set_title(task, fontsize=9)
    for ax in axes.flat[len(cuts.tasks) :]:
        ax.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", fontsize=8)
    figure.supxlabel("mean rank that is left", fontsize=9)
    figure.supylabel("score minus the whole adapter's", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = Cuts(read_suite_file(folder), read_results(folder))
    (folder / "cuts.md").write_text(page(found), encoding="utf-8")
    picture(found, folder / "cuts.png")
