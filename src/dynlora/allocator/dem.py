"""DEM (Eq. 10) of a model's adapter: as a loss term, or added to the gradients."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dynlora.allocation import add_dem_gradients_, dem_penalty
from dynlora.allocator.stacks import stacks
from dynlora.lora.components import LoraComponents, find_adapter, find_components
from dynlora.lora.sharding import add_gradient_, full_tensor, is_sharded


def dem_loss(model: nn.Module, adapter: str | None = None) -> Tensor:
    """The penalty of Eq. 10 on a model's LoRA adapter, with gradient.

    R = (1/n) Σᵢ (Var(aᵢ) + Var(bᵢ)), n = components in the model

    RankAllocator with ``dem_weight`` above 0 adds η·∂R to the gradients itself; this is for loops that
    want ``eta * dem_loss(model)`` in the loss.

    Args:
        model: a model with a LoRA adapter.
        adapter: which one; may be left out if there is one, or one that is trainable.

    Returns:
        A scalar, 0 or more.
    """
    adapter, _ = find_adapter(model, adapter)
    modules = [m for m in find_components(model, adapter) if not m.is_dropped]
    factors = [factor for m in modules for pair in m.pairs for factor in pair]
    vectors = [f.vectors(full_tensor(f.parameter)).flatten(0, 1) for f in factors]
    return dem_penalty(vectors, max(1, sum(m.rank for m in modules)))


@torch.no_grad()
def add_dem_to_gradients_(
    modules: Sequence[LoraComponents], *, factor: float, grad_scale: Tensor | float | None = None
) -> None:
    """Add the gradient of ``factor`` · Σᵢ (Var(aᵢ) + Var(bᵢ)) to the modules' gradients, in place.

    Args:
        modules: none of them dropped.
        factor: η/n.
        grad_scale: what the gradients are multiplied by, a tensor on their device; None for 1.
    """
    for dim in (0, 1):  # A, then B
        add = partial(add_dem_gradients_, rank_dim=dim, factor=factor, grad_scale=grad_scale)
        weights = [pair[dim].parameter for m in modules for pair in m.pairs]
        for weight in (w for w in weights if is_sharded(w)):
            full = full_tensor(weight).detach()
            penalty = torch.zeros_like(full)
            add([penalty], [full])
            add_gradient_(weight, penalty)
        whole = [w for w in weights if not is_sharded(w)]
        for weight in whole:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for rows in stacks(whole, [w.shape for w in whole]):
            gradients = [g for i in rows if (g := whole[i].grad) is not None]
            add(gradients, [whole[i].detach() for i in rows])
