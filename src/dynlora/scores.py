"""Choices beside the paper's: other importances, smoothed like Eq. 8, and a budget in parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynlora import allocation
from dynlora.adapter.components import GatedLayer
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.sharding import whole
from dynlora.measures import component_sizes

Score = Callable[[Sequence[GatedLayer]], None]


def norm(gated: GatedLayer) -> Tensor:
    """S · ‖cᵢ bᵢ aᵢᵀ‖_F, (rank,): modules that change more keep more.

    A share (Eq. 7) adds up to about 1 in every module, which pulls ranks towards uniform.
    """
    gram_a, gram_b = gated.grams()
    gate = whole(gated.gate).to(gram_a.dtype)
    return gated.scaling * allocation.component_norms(gram_a, gram_b, gate)


def gate(gated: GatedLayer) -> Tensor:
    """|cᵢ|, (rank,): free to compute, and the norm itself where all aᵢ and bᵢ are of one length."""
    return whole(gated.gate).abs()


def sensitivity(gated: GatedLayer) -> Tensor:
    """|cᵢ ∂L/∂cᵢ|, (rank,), gradient of the step just made: what the loss loses with a component.

    A gate that received no gradient scores 0.
    """
    c = whole(gated.gate)
    if gated.gate.grad is None:
        return torch.zeros_like(c)
    return allocation.component_sensitivity(c, whole(gated.gate.grad))


IMPORTANCES: dict[str, Callable[[GatedLayer], Tensor]] = {
    "norm": norm,
    "gate": gate,
    "sensitivity": sensitivity,
}
"""By the name in ``DynLoraConfig.importance``; the paper's ``share`` is RankAllocator's own."""


def chosen_score(config: DynLoraConfig) -> Score | None:
    """The score for RankAllocator that the config names; None for the paper's."""
    if config.importance == "share":
        return None
    importance = IMPORTANCES[config.importance]

    @torch.no_grad()
    def score(layers: Sequence[GatedLayer]) -> None:
        emas = [gated.ema for gated in layers]
        found = [
            importance(gated).to(e) if len(e) else e for gated, e in zip(layers, emas, strict=True)
        ]
        allocation.smooth_importance_(emas, found, beta=config.ema_beta)

    return score


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
