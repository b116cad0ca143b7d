"""Which components stay: all components of all modules compete with each other (paper section 3.3)."""

import torch
from torch import Tensor


def select_components(scores: Tensor, budget: int) -> Tensor:
    """Keep exactly ``budget`` components, the best of the whole model.

    Ties go to the earlier module, then to the lower index, so chance never decides. The official
    code cuts every component at or below a threshold and may cut more than it plans.

    Args:
        scores: smoothed importance of all components, in module order, (components,), finite.
        budget: components to keep, in 0..components.

    Returns:
        True where a component stays, (components,), exactly ``budget`` times.

    Raises:
        ValueError: ``budget`` lies outside 0..components, or a score is NaN or infinite.

    Examples:
        >>> select_components(torch.tensor([0.2, 0.9, 0.5, 0.5]), 2)
        tensor([False,  True,  True, False])
    """
    if not 0 <= budget <= scores.numel():
        raise ValueError(
            f"budget={budget} must lie in 0..{scores.numel()}, the number of components."
        )
    _check_finite(scores)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:budget]] = True
    return keep


def select_within(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Keep the components that bring most score per number stored, as far as the budget goes.

    The greedy answer to the knapsack: by falling sᵢ / sizeᵢ, each component that still fits. A rank-one
    component of a wide module costs more than one of a narrow module; counted in components both cost
    one, and a model can end with more parameters than a LoRA of the same mean rank.

    Args:
        scores: smoothed importance of all components, in module order, (components,), finite. Those
            below 0 never stay.
        sizes: numbers in aᵢ and bᵢ, (components,), positive integers.
        budget: numbers that may be kept in the whole model, 0 or more.

    Returns:
        True where a component stays, (components,); together they hold at most ``budget`` numbers. Ties
        go to the earlier module, then to the lower index.

    Raises:
        ValueError: ``budget`` is negative, or a score is NaN or infinite.

    Examples:
        >>> scores, sizes = torch.tensor([0.9, 0.8, 0.5]), torch.tensor([9, 4, 3])
        >>> select_within(scores, sizes, 12)
        tensor([False,  True,  True])
    """
    if budget < 0:
        raise ValueError(f"budget={budget} must be 0 or more, numbers in the whole adapter.")
    _check_finite(scores)
    density = (scores / sizes).cpu()
    costs = sizes.tolist()
    keep = torch.zeros(len(costs), dtype=torch.bool)
    left, cheapest = budget, min(costs, default=1)
    for i in density.argsort(descending=True, stable=True).tolist():
        if left < cheapest or density[i] < 0:
            break
        if costs[i] <= left:
            keep[i] = True
            left -= costs[i]
    return keep.to(scores.device)


def _check_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or infinity: nothing can be ranked by them.")
