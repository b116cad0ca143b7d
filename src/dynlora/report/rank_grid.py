"""Final ranks as a coloured grid in the terminal: rows are kinds of modules, columns are layers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

WIDTH = 80  # of the terminal, in characters
KIND_WIDTH = 26  # of the row names; longer ones lose their beginning
MEAN_WIDTH = 7  # of the column "mean", with its gap

# Dark to bright as in viridis, for shares of the initial rank 0, (0, 1/4], ... (3/4, 1]. Every cell
# sets both colours, so it reads the same on light and dark terminals; without colour the number says
# it all.
SHADES = (
    Style(color="#ffffff", bgcolor="#440154"),
    Style(color="#ffffff", bgcolor="#3b528b"),
    Style(color="#ffffff", bgcolor="#1f7a8c"),
    Style(color="#000000", bgcolor="#5ec962"),
    Style(color="#000000", bgcolor="#fde725"),
)

_NUMBERED = re.compile(r"(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class LayerStack:
    """The adapted modules of one list of layers: ``rows[kind][layer]`` is a rank."""

    name: str
    rows: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Layer numbers that hold at least one adapted module, ascending."""
        return sorted({layer for row in self.rows.values() for layer in row})


def split_name(name: str) -> tuple[str, int, str] | None:
    """Layer list, layer number and kind of a module; None for a module outside any layer list.

    The first number in the path counts, so an expert's number belongs to the kind.

    >>> split_name("bert.encoder.layer.3.attention.self.query")
    ('bert.encoder.layer', 3, 'attention.self.query')
    >>> split_name("model.layers.0.mlp.experts.7.w1")
    ('model.layers', 0, 'mlp.experts.7.w1')
    >>> split_name("lm_head") is None
    True
    """
    match = _NUMBERED.fullmatch(name)
    return (match["stack"], int(match["layer"]), match["kind"]) if match else None


def group_by_stack(ranks: Mapping[str, int]) -> tuple[list[LayerStack], dict[str, int]]:
    """The layer lists in order of appearance, and the modules that belong to none."""
    stacks: dict[str, LayerStack] = {}
    others: dict[str, int] = {}
    for name, rank in ranks.items():
        parts = split_name(name)
        if parts is None:
            others[name] = rank
            continue
        stack_name, layer, kind = parts
        stack = stacks.setdefault(stack_name, LayerStack(stack_name))
        stack.rows.setdefault(kind, {})[layer] = rank
    return list(stacks.values()), others


def shade(rank: int, *, init_r: int) -> Style:
    """The colours of a cell: darkest for rank 0, brightest for more than 3/4 of ``init_r``."""
    steps = len(SHADES) - 1
    return SHADES[min(-(-rank * steps // init_r), steps)]


def rank_grid(ranks: Mapping[str, int], *, init_r: int, width: int = WIDTH) -> RenderableType:
    """A rich renderable with one grid a layer list, its row and column means, and a legend.

    Args:
        ranks: final rank by full module name, zeros included.
        init_r: rank of the modules at the start, at least 1; the colours are shares of it.
        width: columns of the terminal; more layers than fit are continued in a further grid.

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
    return Group(*parts, _legend(init_r))


def short_kinds(kinds: list[str]) -> dict[str, str]:
    """Row names of at most 26 characters where that keeps them distinct; the end says most."""
    short = {k: k if len(k) <= KIND_WIDTH else "…" + _last_parts(k) for k in kinds}
    return short if len(set(short.values())) == len(kinds) else {k: k for k in kinds}


def _last_parts(kind: str) -> str:
    tail = kind[-(KIND_WIDTH - 1) :]
    return tail.partition(".")[2] or tail


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


def _legend(init_r: int) -> RenderableType:
    steps = len(SHADES) - 1
    legend = Text("rank ", style="dim")
    lowest = 0
    for step, style in enumerate(SHADES):
        highest = step * init_r // steps
        if highest < lowest:
            continue  # fewer ranks than shades
        legend.append(f" {lowest}" if lowest == highest else f" {lowest}-{highest}", style=style)
        legend.append(" ", style=style)
        lowest = highest + 1
    return Padding(legend.append(f"  of {init_r} at the start", style="dim"), (1, 0, 0, 0))
