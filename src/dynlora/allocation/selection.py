"""Which components stay: all components of all modules compete with each other (paper section 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def select_components(
    scores: Tensor,
    costs: Tensor,
    budget: int,
    *,
    floors: Sequence[int] = (),
    sizes: Sequence[int] = (),
) -> Tensor:
    """Keep the components with the most score per cost, as far as the budget goes.

    By falling sᵢ / costᵢ each component that still fits: the greedy answer to the knapsack. With equal
    costs it is the paper's rule, exactly the best ``budget / cost``. The official code cuts every
    component at or below a threshold and may cut more than it plans.

    Args:
        scores: smoothed importance of all components, in module order, (components,), finite. Those
            below 0 never stay.
        costs: what each component takes from the budget, (components,), positive integers.
        budget: what may be kept in the whole model, 0 or more.
        floors: how many of the best components of each module stay first, as far as they fit.
        sizes: components of each module, in module order; needed with ``floors``.

    Returns:
        True where a component stays, (components,); together they cost at most ``budget``. Ties go to
        the earlier module, then to the lower index, so chance never decides.

    Raises:
        ValueError: ``budget`` is negative, or a score is NaN or infinite.

    Examples:
        >>> scores, costs = torch.tensor([0.9, 0.8, 0.5]), torch.tensor([9, 4, 3])
        >>> select_components(scores, costs, 12)
        tensor([False,  True,  True])
        >>> select_components(torch.tensor([0.2, 0.9, 0.5, 0.5]), torch.ones(4, dtype=torch.int64), 2)
        tensor([False,  True,  True, False])
    """
    if budget < 0:
        raise ValueError(f"budget={budget} must be 0 or more.")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or infinity: nothing can be ranked by them.")
    density = (scores.double() / costs.to(scores.device)).cpu()
    price = costs.tolist()
    order = density.argsort(descending=True, stable=True).tolist()
    module = [m for m, size in enumerate(sizes) for _ in range(size)]
    left_of, first = list(floors), set()
    for i in order if any(floors) else ():
        if left_of[module[i]]:
            left_of[module[i]] -= 1
            first.add(i)
    order.sort(key=lambda i: i not in first)  # stable
    keep = torch.zeros(len(price), dtype=torch.bool)
    left, cheapest = budget, min(price, default=1)
    for i in order:
        if left < cheapest:
            break
        if density[i] >= 0 and price[i] <= left:
            keep[i] = True
            left -= price[i]
    return keep.to(scores.device)
