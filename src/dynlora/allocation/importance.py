"""How much each rank-one component contributes to its module's update (paper Eq. 7 and 8).

Everything is computed from the r x r Gram matrices A Aᵀ and Bᵀ B. They are exact and small: no
(out, in) and no (rank, out, in) tensor is ever formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IMPORTANCE_EPS = 1e-8
"""Added to the denominator of Eq. 7, as in the official code; the paper has no such term."""


def component_norms(gram_a: Tensor, gram_b: Tensor, c: Tensor) -> Tensor:
    """Frobenius norm of every rank-one component.

    ‖cᵢ bᵢ aᵢᵀ‖_F = |cᵢ| ‖aᵢ‖ ‖bᵢ‖ = |cᵢ| sqrt((A Aᵀ)ᵢᵢ (Bᵀ B)ᵢᵢ)        [numerator of Eq. 7]

    Args:
        gram_a: A Aᵀ, the inner products of the rows aᵢ of A, (..., rank, rank).
        gram_b: Bᵀ B, the inner products of the columns bᵢ of B, (..., rank, rank).
        c: one gate per component, (..., rank).

    Returns:
        (..., rank), never negative.

    Examples:
        >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])
        >>> component_norms(a @ a.T, b.T @ b, torch.tensor([-0.5]))
        tensor([5.])
    """
    squared = gram_a.diagonal(dim1=-2, dim2=-1) * gram_b.diagonal(dim1=-2, dim2=-1)
    return c.abs() * squared.sqrt()


def update_norm(gram_a: Tensor, gram_b: Tensor, c: Tensor) -> Tensor:
    """Frobenius norm of a module's whole update, without the constant scaling.

    ‖ΔW‖_F = ‖Σᵢ cᵢ bᵢ aᵢᵀ‖_F = sqrt(Σᵢⱼ cᵢ cⱼ (aᵢ·aⱼ) (bᵢ·bⱼ))          [denominator of Eq. 7]

    Args:
        gram_a: A Aᵀ, (..., rank, rank).
        gram_b: Bᵀ B, (..., rank, rank).
        c: gates, (..., rank).

    Returns:
        (...,), never negative; rounding below zero is cut off where components cancel.

    Examples:
        >>> eye = torch.eye(2)
        >>> update_norm(eye, eye, torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    squared = (c.unsqueeze(-1) * c.unsqueeze(-2) * gram_a * gram_b).sum((-2, -1))
    return squared.clamp_min(0).sqrt()


def component_importance(gram_a: Tensor, gram_b: Tensor, c: Tensor) -> Tensor:
    """Share of every component in the Frobenius norm of its own module's update.

    sᵢ = ‖cᵢ bᵢ aᵢᵀ‖_F / (‖ΔW‖_F + 1e-8)                                   [Eq. 7; 1e-8 is ours
    and the official code's]

    Args:
        gram_a: A Aᵀ, (..., rank, rank).
        gram_b: Bᵀ B, (..., rank, rank).
        c: gates, (..., rank).

    Returns:
        (..., rank), never negative; may exceed 1 where components cancel each other.

    Examples:
        >>> eye = torch.eye(2)
        >>> component_importance(eye, eye, torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    whole = update_norm(gram_a, gram_b, c).unsqueeze(-1)
    return component_norms(gram_a, gram_b, c) / (whole + IMPORTANCE_EPS)


def component_sensitivity(c: Tensor, gradient: Tensor) -> Tensor:
    """First-order estimate of what the loss loses with a component.

    L(cᵢ = 0) − L ≈ −cᵢ ∂L/∂cᵢ, hence sᵢ = |cᵢ ∂L/∂cᵢ|

    The gate scales its whole component, so one product stands for all of its weights; AdaLoRA averages
    such products over every entry of its triplets.

    Args:
        c: gates, (..., rank).
        gradient: ∂L/∂c, (..., rank).

    Examples:
        >>> component_sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        tensor([1., 3.])
    """
    return (c * gradient).abs()


def smooth_importance_(
    smoothed: Sequence[Tensor], importance: Sequence[Tensor], *, beta: float
) -> None:
    """Exponential moving average of the importance, in place.

    s̃ᵢ ← β s̃ᵢ + (1 − β) sᵢ, starting at 0, no bias correction (it would not change a ranking)  [Eq. 8]

    Args:
        smoothed: running averages, one (rank,) tensor a module; changed in place.
        importance: the step's importance, the same shapes.
        beta: weight of the past, in [0, 1).

    Examples:
        >>> ema = [torch.zeros(2)]
        >>> smooth_importance_(ema, [torch.tensor([1.0, 2.0])], beta=0.9)
        >>> ema
        [tensor([0.1000, 0.2000])]
    """
    if smoothed:
        torch._foreach_mul_(list(smoothed), beta)
        torch._foreach_add_(list(smoothed), list(importance), alpha=1 - beta)
