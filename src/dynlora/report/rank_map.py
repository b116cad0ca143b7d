"""Ranks as a map: kinds of modules in rows, layers in columns, and the colours of ranks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

CELL = 16  # pixels of a module's square in the array

COLORS = ("#440154", "#3b528b", "#1f7a8c", "#5ec962", "#fde725")
"""viridis, for rank 0 and for each quarter of the largest rank."""

_NUMBERED = re.compile(r"(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class LayerStack:
    """The adapted modules of one list of layers: ``rows[kind][layer]`` is a value: a rank."""

    name: str
    rows: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Layer numbers that hold at least one adapted module, ascending."""
        return sorted({layer for row in self.rows.values() for layer in row})


def group_by_stack(values: Mapping[str, int]) -> tuple[list[LayerStack], dict[str, int]]:
    """The layer lists in order of appearance, and the modules that belong to none.

    The first number in a module's path is that of its layer, so an expert's belongs to the kind.

    >>> group_by_stack({"model.layers.0.mlp.experts.7.w1": 4, "lm_head": 2})
    ([LayerStack(name='model.layers', rows={'mlp.experts.7.w1': {0: 4}})], {'lm_head': 2})
    """
    stacks: dict[str, LayerStack] = {}
    others: dict[str, int] = {}
    for name, value in values.items():
        if (match := _NUMBERED.fullmatch(name)) is None:
            others[name] = value
        else:
            stack = stacks.setdefault(match["stack"], LayerStack(match["stack"]))
            stack.rows.setdefault(match["kind"], {})[int(match["layer"])] = value
    return list(stacks.values()), others


def shade_of(rank: int, largest: int) -> int:
    """0 for rank 0, then 1 to 4 by quarters of the largest rank; the page's script does the same."""
    return min(-(-rank * 4 // max(largest, 1)), 4)


def shade_ranges(largest: int) -> list[tuple[int, str]]:
    """The shades that occur and the ranks they stand for, for a legend.

    >>> shade_ranges(6)
    [(0, '0'), (1, '1'), (2, '2-3'), (3, '4'), (4, '5-6')]
    """
    ranks: dict[int, list[int]] = {}
    for rank in range(largest + 1):
        ranks.setdefault(shade_of(rank, largest), []).append(rank)
    return [(s, f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}") for s, r in ranks.items()]


def rank_matrix(ranks: Mapping[str, int]) -> tuple[list[str], list[int], NDArray[np.float64]]:
    """Names of the rows, numbers of the layers, and ranks, NaN where a layer has no such module.

    Modules outside of any layer list are one row at the end, beside each other.
    """
    stacks, others = group_by_stack(ranks)
    layers = sorted({layer for stack in stacks for layer in stack.layers})
    rows = {
        f"{stack.name}: {kind}" if len(stacks) > 1 else kind: [row.get(i) for i in layers]
        for stack in stacks
        for kind, row in stack.rows.items()
    }
    rows |= {"others": list(others.values())} if others else {}
    matrix = np.full((len(rows), max(map(len, rows.values()))), np.nan)
    for line, row in zip(matrix, rows.values(), strict=True):
        line[: len(row)] = [np.nan if rank is None else rank for rank in row]
    return list(rows), layers, matrix


def rank_image(ranks: Mapping[str, int]) -> NDArray[np.uint8]:
    """Ranks as coloured squares: rows are kinds of modules, columns are layers.

    Args:
        ranks: by module name.

    Returns:
        (height, width, 3); modules outside of any layer list are one row at the end, and white is where
        a layer has no such module. Colours are shares of the largest rank.

    Examples:
        >>> rank_image({"layers.0.up": 2, "layers.1.up": 0}).shape
        (16, 32, 3)
    """
    _, _, matrix = rank_matrix(ranks)
    palette = np.array([list(bytes.fromhex(c[1:])) for c in (*COLORS, "#ffffff")], dtype=np.uint8)
    shades = np.ceil(matrix * 4 / max([1, *ranks.values()]))
    colors: NDArray[np.uint8] = palette[np.nan_to_num(shades, nan=5).astype(int)]
    return colors.repeat(CELL, axis=0).repeat(CELL, axis=1)
