"""A budget in parameters instead of components: wide modules pay for their width."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynlora import allocation
from dynlora.adapter.components import GatedLayer
from dynlora.adapter.config import DynLoraConfig
from dynlora.measures import component_sizes


def fitting(
    layers: Sequence[GatedLayer],
    scores: Tensor,
    config: DynLoraConfig,
    step: int,
    window: tuple[int, int],
) -> Tensor:
    """The components to keep under ``budget="parameters"``, (components,), bool.

    Eq. 9 counts numbers in A and B: from all there are, down to those of a LoRA of rank target_r.

    Args:
        layers: the gated layers.
        scores: smoothed importance of all their components, (components,).
        config: of the adapter.
        step: optimizer steps done.
        window: first and last step of the pruning window.
    """
    by_name = component_sizes(layers)
    sizes = torch.cat([torch.full((m.num_components,), by_name[m.name]) for m in layers])
    total = int(sizes.sum())
    allowed = allocation.budget_at(
        step,
        total=total,
        target=min(total, int(config.target_r * sum(by_name.values()))),
        start=window[0],
        stop=window[1],
        schedule=config.schedule,
    )
    return allocation.select_within(scores, sizes.to(scores.device), allowed)
