"""A report in the terminal: figures, losses, and ranks as a coloured grid."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dynlora.report.conclusion import conclusion, summary_row
from dynlora.report.rank_map import COLORS, LayerStack, group_by_stack, shade_of, shade_ranges
from dynlora.report.run import Run

KIND_WIDTH = 26  # of the row names; longer ones lose their beginning
MEAN_WIDTH = 7  # of the column "mean", with its gap
BLOCKS = "▁▂▃▄▅▆▇█"

# Every cell sets both colours, so it reads the same on light and dark terminals.
STYLES = tuple(
    Style(color="#ffffff" if shade < 3 else "#000000", bgcolor=color)
    for shade, color in enumerate(COLORS)
)


def report_view(runs: Sequence[Run], *, width: int) -> RenderableType:
    """What came out, figures side by side, loss and ranks of each; as wide as the terminal at most."""
    parts: list[RenderableType] = []
    for run in runs:
        if text := conclusion(run):
            name = f"{run.name}: " if len(runs) > 1 else ""
            parts.append(Padding(Text(name + text), (0, 0, 1, 0)))
    rows = [summary_row(run) for run in runs]
    figures = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    figures.add_column(style="dim", no_wrap=True)
    for name in dict.fromkeys(name for row in rows for name in row):
        figures.add_row(name, *(row.get(name, "") for row in rows))
    parts.append(figures)
    for run in runs:
        if len(runs) > 1:
            parts.append(Padding(Text(run.name, style="bold"), (1, 0, 0, 0)))
        loss = [value for _, value in run.series("loss")]
        if loss:
            parts.append(Text(f"loss {loss[0]:.4g} → {loss[-1]:.4g}  {sparkline(loss, width=32)}"))
        if run.ranks:
            parts += [Text(), rank_grid(run.ranks, init_r=run.init_r, width=width)]
    return Group(*parts)


def sparkline(values: Sequence[float], *, width: int) -> str:
    """A curve of block characters, lowest to highest value.

    >>> sparkline([0, 1, 2, 3], width=4)
    '▁▃▆█'
    """
    step = max(len(values) / width, 1.0)
    shown = [values[int(i * step)] for i in range(int(len(values) / step))]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in shown)


def rank_grid(
    ranks: Mapping[str, int], *, init_r: int, width: int = 80, of: str = "at the start"
) -> RenderableType:
    """One grid for each list of layers, kinds of modules in rows, with means, and a legend.

    Args:
        ranks: rank by full module name, zeros included.
        init_r: largest rank; the colours are shares of it.
        width: columns of the terminal; more layers than fit are continued in a further grid.
        of: what the legend calls ``init_r``, for ranks whose start is not known.
    """
    stacks, others = group_by_stack(ranks)
    parts: list[RenderableType] = []
    for stack in stacks:
        if len(stacks) > 1:
            parts.append(Text(stack.name, style="bold", overflow="ellipsis", no_wrap=True))
        longest = max(max(ranks.values()), stack.layers[-1])
        cell_width = max(len(str(longest)) + 1, 4)
        names = short_kinds(list(stack.rows))
        free = width - min(max(map(len, names.values())), KIND_WIDTH) - MEAN_WIDTH
        fit = max(free // cell_width, 1)
        parts += [
            _grid(stack, names, stack.layers[i : i + fit], init_r, cell_width)
            for i in range(0, len(stack.layers), fit)
        ]
    for name, rank in others.items():
        parts += [Text.assemble(_cell(rank, init_r, 3), f"  {name}")]
    legend = Text("rank ", style="dim")
    for shade, text in shade_ranges(init_r):
        legend.append(f" {text} ", style=STYLES[shade])
    legend.append(f"  of {init_r} {of}", style="dim")
    return Group(*parts, Padding(legend, (1, 0, 0, 0)))


def _grid(
    stack: LayerStack, names: Mapping[str, str], layers: list[int], init_r: int, cell_width: int
) -> Table:
    """One table; means are over all layers of a row, also those in another table."""
    rows = stack.rows.values()
    everything = [rank for row in rows for rank in row.values()]
    decimals = 1 if max(everything) < 10 else 0  # what a column of 4 characters has room for
    table = Table(box=None, padding=0, show_edge=False, header_style="dim", show_footer=True)
    table.add_column("layer", footer=Text("mean", style="dim"), max_width=KIND_WIDTH)
    for layer in layers:
        mean = Text(_mean([row[layer] for row in rows if layer in row], decimals), style="dim")
        table.add_column(str(layer), footer=mean, justify="right", width=cell_width)
    table.add_column("mean", footer=_mean(everything), justify="right", width=MEAN_WIDTH)
    for kind, row in stack.rows.items():
        cells = [
            _cell(row[i], init_r, cell_width) if i in row else Text("-", style="dim")
            for i in layers
        ]
        table.add_row(names[kind], *cells, _mean(list(row.values())))
    return table


def _cell(rank: int, init_r: int, width: int) -> Text:
    return Text(f"{rank:>{width}}", style=STYLES[shade_of(rank, init_r)])


def _mean(ranks: Sequence[int], decimals: int = 2) -> str:
    return f"{sum(ranks) / len(ranks):.{decimals}f}"


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Row names of at most 26 characters where that keeps them distinct; the end says most."""
    short = {}
    for kind in kinds:
        tail = kind[-(KIND_WIDTH - 1) :]
        short[kind] = kind if len(kind) <= KIND_WIDTH else "…" + (tail.partition(".")[2] or tail)
    return short if len(set(short.values())) == len(kinds) else {k: k for k in kinds}
