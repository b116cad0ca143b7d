"""Line charts as inline SVG, drawn by matplotlib, in colours that read on light and on dark pages."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dynlora.report.run import Points

MAX_POINTS = 400  # of a line; more are thinned out evenly
MAX_MARKED = 12  # a line of so few points shows them: what lies between was not measured
COLORS = (
    "#1f83c4", "#d9622b", "#2a9d6f", "#b8529a", "#a07d16", "#6f6fd8", "#d14b45", "#6b7a88",
)  # fmt: skip
GREY = "#7d8590"  # of axes and text

_STYLE = {
    "svg.fonttype": "none", "font.size": 11, "text.color": GREY, "axes.labelcolor": GREY,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25,
    "axes.prop_cycle": "cycler('color', [" + ", ".join(repr(c) for c in COLORS) + "])",
    "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its points, and how it is drawn."""

    name: str
    points: Points
    color: int = 0
    is_stepped: bool = False  # holds its value until the next point
    is_dashed: bool = False


@dataclass(frozen=True)
class Band:
    """An area between two curves over the same steps."""

    steps: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    color: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart with its words: ``summary`` says in one sentence what it shows."""

    title: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    summary: str = ""
    x_label: str = "optimizer step"
    mark: tuple[float, float] | None = None  # a point that was chosen

    def svg(self, number: int) -> str:
        """The picture; ``number`` makes its ids unique in the page."""
        with rc_context({**_STYLE, "svg.hashsalt": f"chart{number}"}):
            figure = Figure(figsize=(5.6, 3.1), layout="constrained")
            axes = figure.subplots()
            for band in self.bands:
                color = COLORS[band.color % len(COLORS)]
                axes.fill_between(band.steps, band.low, band.high, color=color, alpha=0.2, lw=0)
            for line in self.lines:
                _draw(axes, line)
            if self.mark is not None:
                axes.plot(*self.mark, marker="o", markersize=9, color=COLORS[1], linestyle="")
            axes.set_xlabel(self.x_label)
            axes.set_ylabel(self.y_label)
            _tick(axes, [y for line in self.lines for _, y in line.points])
            if len(self.lines) > 1:
                axes.legend(loc="best", fontsize=10)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return _inline(file.getvalue(), number, self.title, self.summary)


def _draw(axes: Any, line: Line) -> None:
    points = thinned(line.points)
    is_marked = len(points) == 1 or (len(points) <= MAX_MARKED and not line.is_stepped)
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        label=line.name,
        color=COLORS[line.color % len(COLORS)],
        linestyle="--" if line.is_dashed or line.color >= len(COLORS) else "-",
        drawstyle="steps-post" if line.is_stepped else "default",
        marker="o" if is_marked else "",
        markersize=4,
        linewidth=1.8,
    )


def _tick(axes: Any, values: Sequence[float]) -> None:
    """Whole steps below; large numbers with k or M; from 0 where the values nearly reach it."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if values and max(map(abs, values)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if values and 0 <= min(values) < max(values) / 2:
        axes.set_ylim(bottom=0)


def _inline(svg: str, number: int, title: str, summary: str) -> str:
    """The drawing as part of a page: described, without what names a place on the net."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    inner = body[body.index(">") + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)  # names that each picture would repeat
    inner = re.sub(r'font: ([\d.]+px) [^;"]*', r"font: \1 system-ui, sans-serif", inner)
    return (
        f'<svg {box[0] if box else ""} role="img" aria-labelledby="t{number} d{number}">'
        f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(summary)}</desc>'
        + re.sub(r"\s*\n\s*", " ", inner)
    )


def thinned(points: Points) -> Points:
    """At most ``MAX_POINTS`` of the points, the first and last among them."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
