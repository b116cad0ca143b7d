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

    >>> select_components(torch.tensor([0.2, 0.9, 0.5, 0.5]), 2)
    tensor([False,  True,  True, False])
    """
    if not 0 <= budget <= scores.numel():
        raise ValueError(
            f"budget={budget} must lie in 0..{scores.numel()}, the number of components."
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or infinity: nothing can be ranked by them.")
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:budget]] = True
    return keep
