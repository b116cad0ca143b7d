"""What a run records of itself: numbers that a report or a live curve shows and training never needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora.lora.components import LoraComponents

_QUARTERS = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)


def prune_event(
    modules: Sequence[LoraComponents],
    scores: Tensor,
    before: Tensor,
    keep: Tensor,
    *,
    step: int,
    cost: int,
) -> dict[str, Any]:
    """One entry of a history: which components were cut, and what the others look like.

    Args:
        modules: after the cut.
        scores: what the choice was made by, of all components, (components,); below 0 where there was no
            choice, because pruned components do not come back.
        before: True where a component was alive before, (components,).
        keep: True where it is alive now, (components,).
        step: optimizer steps done.
        cost: what the live components take from the budget.

    Returns:
        step, cost, live, cut and revived (components, since the event before), ranks (by module name,
        zeros included), importance_kept and importance_cut (see ``five_numbers``).
    """
    return {
        "step": step,
        "cost": cost,
        "live": int(keep.sum()),
        "cut": int((before & ~keep).sum()),
        "revived": int((keep & ~before).sum()),
        "ranks": {m.name: int(m.live.sum()) for m in modules},
        "importance_kept": five_numbers(scores[keep]),
        "importance_cut": five_numbers(scores[~keep & (scores >= 0)]),
    }


def five_numbers(values: Tensor) -> list[float] | None:
    """Minimum, lower quartile, median, upper quartile and maximum; None of nothing.

    >>> five_numbers(torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0]))
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if values.numel() == 0:
        return None
    return values.double().cpu().quantile(_QUARTERS, interpolation="nearest").tolist()


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process now and, where CUDA is in use, the peak that torch allocated."""
    import psutil

    memory = {"process": int(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        memory["cuda_peak"] = int(torch.cuda.max_memory_allocated())
    return memory
