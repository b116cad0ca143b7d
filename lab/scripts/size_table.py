"""Score against size, from the results of a suite of `lora-r…` and of methods that find a size.

python lab/scripts/size_table.py lab/results/size-answer    # sizes.md and sizes.png in that folder
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynlora_lab.bench.plan import chosen_rate
from dynlora_lab.bench.results import DONE, Result, read_results, read_suite_file
from dynlora_lab.bench.statistics import Difference, mean_text, paired
from dynlora_lab.bench.suite import Suite

LORA = "lora-r"


@dataclass(frozen=True)
class Run:
    """What the tables need of one cell: score in the suite's unit, parameters, CPU seconds."""

    score: float
    size: int
    cpu: float


Runs = dict[tuple[str, str], dict[float, dict[int, Run]]]
"""By method and task; in each by learning rate, then by seed."""


class Sizes:
    """Runs of a suite, at the learning rate that each method's sweep chose."""

    def __init__(self, suite: Suite, results: Mapping[str, Result]) -> None:
        self.suite = suite
        self.tasks, self.methods = list(suite.tasks), list(suite.methods)
        self.runs: Runs = defaultdict(lambda: defaultdict(dict))
        self.metric: dict[str, str] = {}
        self.sign: dict[str, int] = {}
        for result in results.values():
            if result["status"] != DONE:
                continue
            cell = result["cell"]
            self.metric[cell["task"]] = result["metric"]
            self.sign[cell["task"]] = 1 if result["is_better_higher"] else -1
            self.runs[cell["method"], cell["task"]][cell["learning_rate"]][cell["seed"]] = Run(
                suite.scale_of(cell["task"]) * result["reported"]["final"],
                result["budget"]["parameters_end"],
                result["cpu_s"],
            )
        self.rates = {
            (method, task): chosen_rate(suite, results, task, method)
            for method in self.methods
            for task in self.tasks
        }
        common = set.intersection(*(set(self.best(m, t)) for m, t in self.rates))
        self.seeds = sorted(common & set(suite.seeds)) or sorted(common & set(suite.tune_seeds))
        self.full = {
            task: max(r.size for m in self.methods for r in self.best(m, task).values())
            for task in self.tasks
        }

    def best(self, method: str, task: str) -> dict[int, Run]:
        """Runs at the chosen learning rate by seed."""
        rate = self.rates[method, task]
        return {} if rate is None else self.runs[method, task][rate]

    def loras(self) -> list[str]:
        """Methods of one rank, the smallest first."""
        names = [name for name in self.methods if name.startswith(LORA)]
        return sorted(names, key=lambda name: int(name.removeprefix(LORA)))

    def share(self, method: str) -> float:
        """Parameters, as a share of the largest adapter's, mean of tasks."""
        return statistics.mean(
            statistics.mean(self.best(method, task)[s].size for s in self.seeds) / self.full[task]
            for task in self.tasks
        )

    def cpu(self, method: str) -> float:
        """Seconds of a run, mean of tasks."""
        return statistics.mean(
            self.best(method, task)[s].cpu for task in self.tasks for s in self.seeds
        )

    def scores(self, method: str, task: str) -> list[float]:
        """By seed."""
        return [self.best(method, task)[s].score for s in self.seeds]

    def against(self, method: str, other: str) -> list[list[float]]:
        """Method minus the other by task and seed; positive is better."""
        return [
            [
                self.sign[task] * (a - b)
                for a, b in zip(self.scores(method, task), self.scores(other, task), strict=True)
            ]
            for task in self.tasks
        ]

    def against_own_size(self, method: str, *, is_tuned: bool) -> list[list[float]] | None:
        """Method minus the LoRAs around its final size, by task and seed; None where those did not run."""
        groups = []
        for task in self.tasks:
            rate = self.rates[method, task]
            by_rank = [
                self.best(name, task) if is_tuned else self.runs[name, task].get(rate, {})
                for name in self.loras()
            ]
            if rate is None or not all(set(self.seeds) <= set(runs) for runs in by_rank):
                return None
            groups.append(
                [
                    self.sign[task] * _above(self.best(method, task)[s], [r[s] for r in by_rank])
                    for s in self.seeds
                ]
            )
        return groups


def _above(run: Run, loras: Iterable[Run]) -> float:
    points = sorted((r.size, r.score) for r in loras)
    sizes = np.log([size for size, _ in points])
    return run.score - float(np.interp(np.log(run.size), sizes, [score for _, score in points]))


def page(sizes: Sizes) -> str:
    """Both tables, and what they cost."""
    suite = sizes.suite
    sweep = sum(sizes.cpu(name) for name in sizes.loras())
    others = [name for name in sizes.methods if name not in sizes.loras()]
    answers = ", ".join(f"{name} {sizes.cpu(name) / sweep:.2f}" for name in others)
    return (
        f"# Score against size: `{suite.name}`\n\n"
        "Written by `lab/scripts/size_table.py` from the files in `cells/`; edit nothing here.\n\n"
        f"Means and standard deviations over seeds {', '.join(map(str, sizes.seeds))}. The learning rate "
        "of each method and task is the one that the selecting set prefers on seeds "
        f"{', '.join(map(str, suite.tune_seeds))}. Size is the share of the parameters of the largest "
        "adapter. Differences are paired by seed, positive where a method is better, with the 95 % "
        "bootstrap interval.\n\n"
        + "\n".join(score_table(sizes))
        + "\n\n## Against a LoRA of the run's own final size\n\n"
        "Each run minus the LoRAs of the same task and seed, interpolated between the two ranks around "
        "its size, on a logarithmic scale of sizes: where each LoRA has its own best learning rate, and, "
        "where those ran, where all have the learning rate of the run. Wins and losses are runs.\n\n"
        + "\n".join(own_size_table(sizes))
        + "\n\n## Cost of the answer\n\n"
        f"CPU seconds of one run as a share of one run of each of {len(sizes.loras())} ranks "
        f"({', '.join(sizes.loras())}): {answers}.\n"
    )


def score_table(sizes: Sizes) -> list[str]:
    """Score, size and time of each method, the largest first."""
    heads = [f"{task} ({sizes.metric[task]})" for task in sizes.tasks]
    base = sizes.suite.baseline
    head = ["method", *heads, "mean", f"minus {base}", "size", "CPU seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method in sorted(sizes.methods, key=sizes.share, reverse=True):
        by_task = [sizes.scores(method, task) for task in sizes.tasks]
        cells = [_spread(scores) for scores in by_task]
        cells.append(f"{statistics.mean(map(statistics.mean, by_task)):.2f}")
        cells.append("" if method == base else _difference(paired(sizes.against(method, base))))
        cells += [f"{sizes.share(method):.2f}", f"{sizes.cpu(method):.0f}"]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return lines


def own_size_table(sizes: Sizes) -> list[str]:
    """Each method that is no LoRA of one rank against LoRAs of its final size."""
    head = ["method", "LoRAs at", *sizes.tasks, "mean", "wins:losses"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method in sizes.methods:
        for is_tuned in () if method in sizes.loras() else (True, False):
            groups = sizes.against_own_size(method, is_tuned=is_tuned)
            if groups is None:
                continue
            found = paired(groups)
            cells = [f"{statistics.mean(group):+.2f}" for group in groups]
            which = "their own rate" if is_tuned else "its rate"
            row = [method, which, *cells, _difference(found), f"{found.wins}:{found.losses}"]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def _spread(scores: list[float]) -> str:
    return f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"


def _difference(found: Difference) -> str:
    return mean_text(found.mean, found.interval)


def picture(sizes: Sizes, path: Path) -> None:
    """Score by size: the curve of the LoRAs, and each other method's runs as one point with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(sizes.tasks))
    rows = -(-len(sizes.tasks) // columns)
    inches = (3.6 * columns + 1.6, 2.9 * rows)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=inches, layout="constrained", squeeze=False
    )
    others = [name for name in sizes.methods if name not in sizes.loras()]
    for ax, task in zip(axes.flat, sizes.tasks, strict=False):
        loras = [_point(sizes, name, task) for name in sizes.loras()]
        ax.errorbar(*zip(*loras, strict=True), fmt="o-", color="grey", capsize=2, label="LoRA")
        for i, name in enumerate(others):
            size, score, error = _point(sizes, name, task)
            # 35 pairs of mark and colour
            mark = {"fmt": "sD^vP"[i % 5], "color": f"C{i % 7}"}
            ax.errorbar([size], [score], [error], capsize=2, label=name, **mark)
        ax.set_xscale("log", base=2)
        ax.set_xticks([size for size, _, _ in loras], [f"{size:.2g}" for size, _, _ in loras])
        ax.set_title(f"{task} ({sizes.metric[task]})", fontsize=9)
        if sizes.sign[task] < 0:
            ax.invert_yaxis()
    for ax in axes.flat[len(sizes.tasks) :]:
        ax.set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.supxlabel("parameters, as a share of the largest", fontsize=9)
    figure.savefig(path, dpi=110)


def _point(sizes: Sizes, method: str, task: str) -> tuple[float, float, float]:
    """Share of the parameters, mean score, standard error."""
    scores = sizes.scores(method, task)
    share = statistics.mean(sizes.best(method, task)[s].size for s in sizes.seeds)
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return share / sizes.full[task], statistics.mean(scores), error


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = Sizes(read_suite_file(folder), read_results(folder))
    (folder / "sizes.md").write_text(page(found), encoding="utf-8")
    picture(found, folder / "sizes.png")
