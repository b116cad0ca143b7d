"""What a run records of itself: numbers that a report or a live curve shows and training never needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora.adapter.components import GatedLayer
from dynlora.adapter.penalty import dem_of
from dynlora.adapter.sharding import full_shape, whole


@torch.no_grad()
def adapter_measures(layers: Sequence[GatedLayer]) -> dict[str, float]:
    """DEM and the gates of the live components, with one transfer from the device.

    Returns:
        dem: R of Eq. 10 over the components that are stored.
        gate_mean, gate_max: of abs(c) over the live components; 0 if there is none.
    """
    present = [m for m in layers if not m.is_dropped]
    gates = [whole(m.gate).detach()[m.live].abs().float().cpu() for m in present]
    values = torch.cat(gates) if gates else torch.zeros(0)
    return {
        "dem": float(dem_of(present)),
        "gate_mean": float(values.mean()) if len(values) else 0.0,
        "gate_max": float(values.max()) if len(values) else 0.0,
    }


@torch.no_grad()
def prune_event(
    layers: Sequence[GatedLayer], scores: Tensor, before: Tensor, keep: Tensor, *, step: int
) -> dict[str, Any]:
    """One entry of a history: which components were cut, and what the others look like.

    Args:
        layers: the gated layers, after the cut.
        scores: smoothed importance that the choice was made by, of all components, (components,).
        before: True where a component was alive before, (components,).
        keep: True where it is alive now, (components,).
        step: optimizer steps done.

    Returns:
        step, budget (components kept), cut and revived (since the event before), ranks (by module
        name, zeros included), importance_kept and importance_cut (minimum, quartiles and maximum
        between them, or None where there is none), and the measures of ``adapter_measures``.
    """
    return {
        "step": step,
        "budget": int(keep.sum()),
        "cut": int((before & ~keep).sum()),
        "revived": int((keep & ~before).sum()),
        "ranks": {m.name: int(m.live.sum()) for m in layers},
        "importance_kept": five_numbers(scores[keep]),
        "importance_cut": five_numbers(scores[~keep]),
        **adapter_measures(layers),
    }


def five_numbers(values: Tensor) -> list[float] | None:
    """Minimum, lower quartile, median, upper quartile and maximum; None of nothing.

    >>> five_numbers(torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0]))
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if values.numel() == 0:
        return None
    ordered = values.float().cpu().sort().values
    places = [round(share * (len(ordered) - 1)) for share in (0, 0.25, 0.5, 0.75, 1)]
    return [float(ordered[i]) for i in places]


def component_sizes(layers: Sequence[GatedLayer]) -> dict[str, int]:
    """Numbers in a row of A and a column of B, by name, of the modules that still hold factors."""
    sizes = {}
    for gated in layers:
        if not gated.is_dropped:
            a, b, _ = (full_shape(p) for p in gated.parameters)
            sizes[gated.name] = a[1:].numel() + b[0] * b[2:].numel()
    return sizes


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process now and, where CUDA is in use, the peak that torch allocated."""
    import psutil

    memory = {"process": int(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        memory["cuda_peak"] = int(torch.cuda.max_memory_allocated())
    return memory
