"""Charts and the rank map as matplotlib draws them, in colours that read on light and on dark pages."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dynlora.files import whole_file
from dynlora.report.conclusion import metric_label, which_rank
from dynlora.report.rank_map import rank_matrix
from dynlora.report.run import Points, Run, evenly

MAX_POINTS = 400  # of a line
MAX_MARKED = 12  # a line of so few points shows them: what lies between was not measured

_GREY = "#7d8590"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dynlora", "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 11, "text.color": _GREY, "axes.labelcolor": _GREY, "axes.edgecolor": _GREY,
    "xtick.color": _GREY, "ytick.color": _GREY, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _GREY, "grid.alpha": 0.25, "legend.frameon": False,
    "axes.prop_cycle": "cycler(linestyle=['-', '--']) * cycler(color=['1f83c4', 'd9622b', '2a9d6f', "
    "'b8529a', 'a07d16', '6f6fd8', 'd14b45', '6b7a88'])",
}  # fmt: skip

_IMPORTANCE_UNITS = {
    "share": "share of the module's update",
    "norm": "norm of the component's update",
    "sensitivity": "⟨b, ∂L/∂b⟩",
    "own": "score of your own function",
}


@dataclass(frozen=True)
class Chart:
    """A drawing for a page, with a title and a sentence on what it shows."""

    title: str
    summary: str
    svg: str

    @property
    def source(self) -> str:
        """The drawing as the address of an image that needs no network."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def run_charts(run: Run) -> list[Chart]:
    """What only one run has: size against loss, the budget, the scores; of these what there is."""
    if not run.states:
        return []
    if run.auto is not None:
        return [size_chart(run, run.auto), budget_chart(run)]
    scored = any(event.get("importance_kept") for event in run.of("prune"))
    return [budget_chart(run), *([importance_chart(run)] if scored else [])]


def shared_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses and metrics, all runs in one drawing each."""
    metrics = dict.fromkeys(name for run in runs for name in run.metrics())
    titles = {"loss": "Training loss"} | {
        n: f"Evaluation: {n.removeprefix('eval_')}" for n in metrics
    }
    return [
        compared(runs, key, title)
        for key, title in titles.items()
        if any(run.series(key) for run in runs)
    ]


@rc_context(_STYLE)
def compared(runs: Sequence[Run], key: str, title: str) -> Chart:
    """One logged value of several runs."""
    figure, axes = _axes(y=metric_label(key))
    ends = []
    for run in runs:
        points = evenly(run.series(key), MAX_POINTS)
        marker = "o" if len(points) <= MAX_MARKED else ""
        if points:
            axes.plot(*zip(*points, strict=True), label=run.name, marker=marker, markersize=4)
            ends.append(f"{run.name} ends at {points[-1][1]:.4g}")
        else:
            axes.plot([])  # keeps the colours of the runs the same in all charts
    return _chart(title, "; ".join(ends), figure)


@rc_context(_STYLE)
def budget_chart(run: Run) -> Chart:
    """What the components cost, and what the schedule allowed."""
    figure, axes = _axes(y=run.unit)
    used: Points = [(step, run.cost(ranks)) for step, ranks in run.states]
    end = max(run.total_steps, run.last_step)
    summary = f"From {used[0][1]:,} to {used[-1][1]:,} {run.unit} by step {used[-1][0]:,}."
    used += [(end, used[-1][1])] if run.is_finished else []
    axes.step(*zip(*used, strict=True), where="post", label="used")
    schedule = run.start.get("schedule") or []
    if run.auto is not None or not schedule:
        return _chart(f"Budget in {run.unit}", summary, figure)
    planned = [used[0], *schedule, (end, schedule[-1][1])]
    axes.step(*zip(*planned, strict=True), where="post", linestyle="--", label="schedule")
    return _chart(f"Budget in {run.unit}: used, and the schedule of Eq. 9", summary, figure)


@rc_context(_STYLE)
def size_chart(run: Run, found: dict[str, Any]) -> Chart:
    """Held-out loss against size, as ``target_r="auto"`` found it."""
    figure, axes = _axes(y="held-out loss", x=run.unit)
    pairs = [*found["tried"], *(row[1:] for row in found["by_rank"])]
    losses = {run.cost(run.states[0][1]): found["whole"]}
    losses |= {cost: loss for cost, loss in pairs if math.isfinite(loss)}
    axes.plot(*zip(*sorted(losses.items()), strict=True), marker="o", markersize=4, label="loss")
    axes.axhline(found["limit"], color="C1", linestyle="--", label="accepted")
    chosen = losses[found["budget"]]
    axes.plot(found["budget"], chosen, marker="o", markersize=9, color="C1", linestyle="")
    return _chart(
        "Held-out loss against size, and the size that was chosen",
        f"{found['budget']:,} {run.unit} were chosen, with a loss of {chosen:.4g} against "
        f"{found['whole']:.4g} of the whole adapter. {which_rank(found)}",
        figure,
    )


@rc_context(_STYLE)
def importance_chart(run: Run) -> Chart:
    """Scores of kept and of cut components at each prune event."""
    figure, axes = _axes(y=_IMPORTANCE_UNITS.get(run.start.get("importance", ""), "score"))
    for color, (key, name) in enumerate((("importance_kept", "kept"), ("importance_cut", "cut"))):
        told = [(e["step"], *e[key]) for e in run.of("prune") if e.get(key)]
        if told:
            steps, _, low, middle, high, _ = zip(*told, strict=True)
            axes.plot(steps, middle, marker="o", markersize=4, label=f"{name}: median")
            axes.fill_between(steps, low, high, color=f"C{color}", alpha=0.2, lw=0)
    return _chart(
        "Importance of kept and cut components",
        "Medians, and bands from the lower to the upper quartile, at each prune event.",
        figure,
    )


def _axes(*, y: str, x: str = "optimizer step") -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _chart(title: str, summary: str, figure: Figure) -> Chart:
    """Whole steps below; large numbers with k or M; from 0 where the values nearly reach it."""
    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    low, high = axes.dataLim.intervaly
    if high >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if 0 <= low < high / 2:
        axes.set_ylim(bottom=0)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best", fontsize=10)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, summary, file.getvalue())


def write_picture(run: Run, path: Path) -> Path:
    """The final rank map as a PNG or SVG file, by the name's ending."""
    if path.suffix not in {".png", ".svg"}:
        raise ValueError(f"picture={str(path)!r} must end in .png or .svg.")
    if not run.ranks:
        raise ValueError(f"{run.folder} has no dynamic ranks to draw ({run.method}).")
    names, layers, matrix = rank_matrix(run.ranks)
    height, width = matrix.shape
    figure = Figure(figsize=(3 + 0.34 * width, 1.2 + 0.34 * height), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=run.init_r, aspect="auto")
    for row, column in np.argwhere(~np.isnan(matrix)):
        rank = int(matrix[row, column])
        color = "black" if rank > 0.6 * run.init_r else "white"
        axes.text(column, row, str(rank), ha="center", va="center", size=8, color=color)
    axes.set_yticks(range(height), names, size=8)
    axes.set_xticks(range(len(layers)), [str(n) for n in layers], size=8)
    axes.set_xlabel("layer", size=9)
    axes.set_title(f"Final ranks of {run.name}", size=9)
    figure.colorbar(drawn, label="rank", shrink=0.9)
    with whole_file(path) as temporary:
        date = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=date)
    return path
