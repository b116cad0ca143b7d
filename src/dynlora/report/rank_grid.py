"""Final ranks as a coloured grid in the terminal: rows are kinds of modules, columns are layers."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dynlora.report.layout import (
    KIND_WIDTH,
    LayerStack,
    group_by_stack,
    shade_of,
    shade_ranges,
    short_kinds,
)

WIDTH = 80  # of the terminal, in characters
MEAN_WIDTH = 7  # of the column "mean", with its gap

# Dark to bright as in viridis, for shares of the initial rank 0, (0, 1/4], ... (3/4, 1]. Every cell
# sets both colours, so it reads the same on light and dark terminals; without colour the number says
# it all.
STYLES = (
    Style(color="#ffffff", bgcolor="#440154"),
    Style(color="#ffffff", bgcolor="#3b528b"),
    Style(color="#ffffff", bgcolor="#1f7a8c"),
    Style(color="#000000", bgcolor="#5ec962"),
    Style(color="#000000", bgcolor="#fde725"),
)


def shade(rank: int, *, init_r: int) -> Style:
    """The colours of a cell: darkest for rank 0, brightest for more than 3/4 of ``init_r``."""
    return STYLES[shade_of(rank, init_r)]


def rank_grid(
    ranks: Mapping[str, int], *, init_r: int, width: int = WIDTH, of: str = "at the start"
) -> RenderableType:
    """A rich renderable with one grid a layer list, its row and column means, and a legend.

    Args:
        ranks: final rank by full module name, zeros included.
        init_r: rank of the modules at the start, at least 1; the colours are shares of it.
        width: columns of the terminal; more layers than fit are continued in a further grid.
        of: what the legend calls ``init_r``, for ranks whose start is not known.

    Raises:
        ValueError: ``init_r`` is below 1, or a rank is negative.
    """
    if init_r < 1:
        raise ValueError(f"init_r={init_r} must be at least 1: the rank before pruning.")
    for name, rank in ranks.items():
        if rank < 0:
            raise ValueError(f"ranks[{name!r}]={rank} must be 0 or more.")
    stacks, others = group_by_stack(ranks)
    parts: list[RenderableType] = []
    cell = len(str(max(ranks.values(), default=0))) + 1  # digits and the space before them
    for stack in stacks:
        if len(stacks) > 1:
            parts.append(Text(stack.name, style="bold", overflow="ellipsis", no_wrap=True))
        cell_width = max(cell, len(str(stack.layers[-1])) + 1, 4)
        name_width = max(len(name) for name in short_kinds(list(stack.rows)).values())
        fit = max((width - min(name_width, KIND_WIDTH) - MEAN_WIDTH) // cell_width, 1)
        parts += [
            _grid(stack, stack.layers[i : i + fit], init_r=init_r, cell_width=cell_width)
            for i in range(0, len(stack.layers), fit)
        ]
    parts += [
        Text.assemble(_cell(rank, init_r=init_r, width=max(cell, 3)), f"  {name}")
        for name, rank in others.items()
    ]
    return Group(*parts, _legend(init_r, of))


def _grid(stack: LayerStack, layers: list[int], *, init_r: int, cell_width: int) -> Table:
    """One table; means are over all layers of a row, also those in another table."""
    table = Table(box=None, padding=0, show_edge=False, header_style="dim", show_footer=True)
    table.add_column("layer", footer=Text("mean", style="dim"), max_width=KIND_WIDTH)
    highest = max(rank for row in stack.rows.values() for rank in row.values())
    decimals = 1 if highest < 10 else 0  # what a column of 4 characters has room for
    for layer in layers:
        column = [row[layer] for row in stack.rows.values() if layer in row]
        mean = Text(_mean_text(column, decimals=decimals), style="dim")
        table.add_column(str(layer), footer=mean, justify="right", width=cell_width)
    ranks = [rank for row in stack.rows.values() for rank in row.values()]
    table.add_column("mean", footer=_mean_text(ranks), justify="right", width=MEAN_WIDTH)
    names = short_kinds(list(stack.rows))
    for kind, row in stack.rows.items():
        cells = [
            _cell(row[i], init_r=init_r, width=cell_width) if i in row else Text("-", style="dim")
            for i in layers
        ]
        table.add_row(names[kind], *cells, _mean_text(list(row.values())))
    return table


def _cell(rank: int, *, init_r: int, width: int) -> Text:
    return Text(f"{rank:>{width}}", style=shade(rank, init_r=init_r))


def _mean_text(ranks: list[int], *, decimals: int = 2) -> str:
    return f"{sum(ranks) / len(ranks):.{decimals}f}"


def _legend(init_r: int, of: str) -> RenderableType:
    legend = Text("rank ", style="dim")
    for shade_number, ranks in shade_ranges(init_r):
        legend.append(f" {ranks}", style=STYLES[shade_number])
        legend.append(" ", style=STYLES[shade_number])
    return Padding(legend.append(f"  of {init_r} {of}", style="dim"), (1, 0, 0, 0))
