"""Line charts as inline SVG that takes its colours from the page, for light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from dynlora.report.run import Points

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 42
MAX_POINTS = 400  # of a line; more are thinned out evenly
MAX_MARKED = 12  # a line of so few points shows them: what lies between was not measured
NUM_COLORS = 8  # of the page's palette; the dash pattern changes where they start over


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

    name: str
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
    unit: str = ""

    def svg(self, number: int) -> str:
        """The picture; ``number`` makes its ids unique in the page."""
        xs, ys = self._values()
        x_axis, y_axis = _Axis.of(xs, LEFT, WIDTH - RIGHT), _Axis.of(ys, HEIGHT - BOTTOM, TOP)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t{number} d{number}">',
            f'<title id="t{number}">{escape(self.title)}</title>',
            f'<desc id="d{number}">{escape(self.summary)}</desc>',
            *_grid(x_axis, y_axis),
            *(_band(band, x_axis, y_axis) for band in self.bands if band.steps),
            *(_line(line, x_axis, y_axis) for line in self.lines if line.points),
            f'<text class="label" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}">optimizer step</text>',
            f'<text class="label" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) '
            f'rotate(-90)">{escape(self.y_label)}</text>',
            "</svg>",
        ]
        return "".join(parts)

    def _values(self) -> tuple[list[float], list[float]]:
        xs = [x for line in self.lines for x, _ in line.points]
        ys = [y for line in self.lines for _, y in line.points]
        for band in self.bands:
            xs += band.steps
            ys += [*band.low, *band.high]
        return xs, ys


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    first: float  # pixel of low
    last: float  # pixel of high

    @classmethod
    def of(cls, values: Sequence[float], first: float, last: float) -> "_Axis":
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low > 0 and low < high / 2:
            low = 0.0  # a range that nearly reaches zero is shown from there
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        return cls(low, high, first, last)

    def at(self, value: float) -> float:
        """Pixel of a value, with one decimal."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)

    def ticks(self) -> list[float]:
        """About five round numbers between the ends."""
        return round_numbers(self.low, self.high)


def round_numbers(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two ends, four to nine of them.

    >>> round_numbers(0, 97)
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    size = (high - low) / 5
    power = 10 ** math.floor(math.log10(size))
    width = next(power * m for m in (1, 2, 5, 10) if power * m >= size)
    first = math.ceil(low / width - 1e-9)
    return [float(f"{i * width:.12g}") for i in range(first, math.floor(high / width + 1e-9) + 1)]


def short_number(value: float) -> str:
    """At most four characters of digits, with k, M or G.

    >>> [short_number(v) for v in (0, 0.05, 12, 1500, 2_000_000)]
    ['0', '0.05', '12', '1.5k', '2M']
    """
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def thinned(points: Points) -> Points:
    """At most ``MAX_POINTS`` of the points, the first and last among them."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4}">{short_number(tick)}</text>')
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(
            f'<text class="x" x="{x}" y="{HEIGHT - BOTTOM + 18}">{short_number(tick)}</text>'
        )
    bottom = HEIGHT - BOTTOM
    return [
        *parts,
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>',
    ]


def _line(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    pixels: list[tuple[float, float]] = []
    for x, y in thinned(line.points):
        here = (x_axis.at(x), y_axis.at(y))
        if line.is_stepped and pixels:
            pixels.append((here[0], pixels[-1][1]))
        pixels.append(here)
    color = f"s{line.color % NUM_COLORS}"
    marks = "".join(
        f'<circle class="{color}" cx="{x}" cy="{y}" r="3"/>'
        for x, y in pixels
        if len(pixels) == 1 or (len(pixels) <= MAX_MARKED and not line.is_stepped)
    )
    path = " ".join(f"{x},{y}" for x, y in pixels)
    dashed = " dash" if line.is_dashed or line.color >= NUM_COLORS else ""
    return f'<polyline class="{color}{dashed}" points="{path}"/>{marks}'


def _band(band: Band, x_axis: _Axis, y_axis: _Axis) -> str:
    there = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(band.steps, band.high, strict=True)]
    back = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(band.steps, band.low, strict=True)]
    path = " ".join(f"{x},{y}" for x, y in [*there, *reversed(back)])
    return f'<polygon class="b{band.color % NUM_COLORS}" points="{path}"/>'
