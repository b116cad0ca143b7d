"""Copies of the adapter that others keep, such as averages, and that will not fit it once it shrinks."""

import gc
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlora.allocator.compaction import with_inner_optimizers
from dynlora.lora.components import LoraComponents


def warn_of_outside_copies(modules: Sequence[LoraComponents], optimizer: Any) -> None:
    """Warn if as many other tensors as the adapter has parameters have their shapes.

    An EMA, a Lookahead optimizer or a snapshot keeps copies that no hook can find; that there are so many
    tensors of these shapes is the only trace of them.

    Args:
        modules: before they are cut.
        optimizer: whose state is known.
    """
    shrinking = [m for m in modules if not m.is_dropped and not bool(m.live.all())]
    parameters = [f.parameter for m in shrinking for f in m.factors]
    expected = Counter(tuple(p.shape) for p in parameters)
    known = {id(t) for p in parameters for t in (p, p.grad)}
    for one in with_inner_optimizers(optimizer) if isinstance(optimizer, Optimizer) else ():
        for state in one.state.values():
            known |= {id(value) for value in state.values()}
    found = Counter(
        tuple(thing.shape)
        for thing in gc.get_objects()
        if type(thing) in {Tensor, torch.nn.Parameter} and id(thing) not in known
    )
    if parameters and all(found[shape] >= count for shape, count in expected.items()):
        warnings.warn(
            f"{len(parameters)} tensors outside the model have the shapes of the adapter's parameters, "
            "which shrink now. An average (EMA), a Lookahead optimizer or a snapshot that is combined with "
            "them later will not fit: let a copied model shrink along with "
            "allocator.also_compact(copy), or keep all shapes until the end with compact=False.",
            stacklevel=2,
        )
