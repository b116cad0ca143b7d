"""Tensors of one shape are stacked, up to a limit at a time.

The number of operations grows with the bytes of the adapter, not with the number of modules, and no
temporary is larger than the limit. Nothing here waits for the device.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from dynlora.lora.sharding import full_shape


class Limits(NamedTuple):
    """Bytes of temporaries; small ones keep a CPU's caches, large ones need few kernel launches."""

    stack: int  # the copies that one stack makes
    grams: int  # the Gram matrices held at once, in fp32


ON_CPU = Limits(stack=375_000, grams=100_000)
"""Temporaries stay below 1 MB: stacking transposed factors takes as much again."""

ON_ACCELERATOR = Limits(stack=64_000_000, grams=8_000_000)
"""The update of a foreach optimizer needs as much; an adapter of 32 MB is scored in one go."""


def limits_of(tensor: Tensor) -> Limits:
    """What temporaries may cost where ``tensor`` lies."""
    return ON_CPU if tensor.device.type == "cpu" else ON_ACCELERATOR


def stacks(tensors: Sequence[Tensor], kinds: Sequence[Hashable]) -> Iterator[list[int]]:
    """Indices of tensors of one kind that make a stack up to the limit, in fp32; at least one each."""
    for rows in groups([(k, t.dtype, t.device) for k, t in zip(kinds, tensors, strict=True)]):
        first = tensors[rows[0]]
        width = first.element_size()
        size = full_shape(first).numel() * (width if width >= 4 else width + 4)  # converted to fp32
        step = max(1, limits_of(first).stack // max(1, size))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance."""
    found = defaultdict(list)
    for i, key in enumerate(keys):
        found[key].append(i)
    return list(found.values())
