"""Module names as a map: layer lists, kinds of modules, layer numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KIND_WIDTH = 26  # of the row names; longer ones lose their beginning

SHADES = 4  # of live ranks: quarters of the initial rank; rank 0 has one of its own

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


def short_kinds(kinds: list[str]) -> dict[str, str]:
    """Row names of at most 26 characters where that keeps them distinct; the end says most."""
    short = {k: k if len(k) <= KIND_WIDTH else "…" + _last_parts(k) for k in kinds}
    return short if len(set(short.values())) == len(kinds) else {k: k for k in kinds}


def _last_parts(kind: str) -> str:
    tail = kind[-(KIND_WIDTH - 1) :]
    return tail.partition(".")[2] or tail


def shade_of(rank: int, init_r: int) -> int:
    """0 for rank 0, then quarters of the initial rank, 1 to 4; the page's script does the same."""
    return min(-(-rank * SHADES // max(init_r, 1)), SHADES)


def shade_ranges(init_r: int) -> list[tuple[int, str]]:
    """The shades that occur and the ranks they stand for, for a legend.

    >>> shade_ranges(6)
    [(0, '0'), (1, '1'), (2, '2-3'), (3, '4'), (4, '5-6')]
    """
    ranges = []
    lowest = 0
    for shade in range(SHADES + 1):
        highest = shade * init_r // SHADES
        if highest >= lowest:  # else fewer ranks than shades
            text = str(lowest) if lowest == highest else f"{lowest}-{highest}"
            ranges.append((shade, text))
            lowest = highest + 1
    return ranges
