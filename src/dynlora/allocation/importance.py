"""How much each rank-one component contributes to its module's update (paper Eq. 7 and 8).

Everything is computed from the r x r Gram matrices A Aᵀ and Bᵀ B. They are exact and small: no
(out, in) and no (rank, out, in) tensor is ever formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IMPORTANCE_EPS = 1e-8
"""Added to the denominator of Eq. 7, as in the official code; the paper has no such term."""


def component_products(gram_a: Tensor, gram_b: Tensor, c: Tensor | None = None) -> Tensor:
    """Frobenius inner products of a module's rank-one components.

    ⟨cᵢ bᵢ aᵢᵀ, cⱼ bⱼ aⱼᵀ⟩ = cᵢ cⱼ (aᵢ·aⱼ) (bᵢ·bⱼ): the diagonal holds the squared norms of the components,
    and all entries together add up to the squared norm of the update ΔW = Σᵢ cᵢ bᵢ aᵢᵀ.

    Args:
        gram_a: A Aᵀ, the inner products of the rows aᵢ of A, (..., rank, rank).
        gram_b: Bᵀ B, the inner products of the columns bᵢ of B, (..., rank, rank).
        c: one gate per component, (..., rank); None where there are no gates, c = 1.

    Returns:
        (..., rank, rank), symmetric.

    Examples:
        >>> ones = torch.ones(2, 2)
        >>> component_products(ones, ones, torch.tensor([3.0, -2.0]))
        tensor([[ 9., -6.],
                [-6.,  4.]])
    """
    products = gram_a * gram_b
    return products if c is None else products * c.unsqueeze(-1) * c.unsqueeze(-2)


def component_norms(products: Tensor) -> Tensor:
    """Frobenius norm of every rank-one component.

    ‖cᵢ bᵢ aᵢᵀ‖_F = |cᵢ| ‖aᵢ‖ ‖bᵢ‖                                         [numerator of Eq. 7]

    Takes what ``component_products`` gives, (..., rank, rank); returns (..., rank), never negative.

    Examples:
        >>> a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])
        >>> component_norms(component_products(a @ a.T, b.T @ b, torch.tensor([-0.5])))
        tensor([5.])
    """
    return products.diagonal(dim1=-2, dim2=-1).sqrt()


def update_norm(products: Tensor) -> Tensor:
    """Frobenius norm of a module's whole update, without the constant scaling.

    ‖ΔW‖_F = ‖Σᵢ cᵢ bᵢ aᵢᵀ‖_F = sqrt(Σᵢⱼ cᵢ cⱼ (aᵢ·aⱼ) (bᵢ·bⱼ))          [denominator of Eq. 7]

    Takes what ``component_products`` gives, (..., rank, rank); returns (...,), never negative: rounding
    below zero is cut off where components cancel.

    Examples:
        >>> update_norm(component_products(torch.eye(2), torch.eye(2), torch.tensor([3.0, 4.0])))
        tensor(5.)
    """
    return products.sum((-2, -1)).clamp_min(0).sqrt()


def component_importance(products: Tensor) -> Tensor:
    """Share of every component in the Frobenius norm of its own module's update.

    sᵢ = ‖cᵢ bᵢ aᵢᵀ‖_F / (‖ΔW‖_F + 1e-8)                                   [Eq. 7; 1e-8 is ours
    and the official code's]

    Takes what ``component_products`` gives, (..., rank, rank); returns (..., rank), never negative; it
    may exceed 1 where components cancel each other.

    Examples:
        >>> component_importance(torch.diag(torch.tensor([9.0, 16.0])))
        tensor([0.6000, 0.8000])
    """
    return component_norms(products) / (update_norm(products).unsqueeze(-1) + IMPORTANCE_EPS)


def component_sensitivities(weight: Tensor, gradient: Tensor, *, dims: Sequence[int]) -> Tensor:
    """First-order estimate of how much the loss changes without each component, with its sign.

    L(without i) − L ≈ −⟨bᵢ, ∂L/∂bᵢ⟩; the importance is the absolute value of ⟨bᵢ, ∂L/∂bᵢ⟩, taken after
    the sum over all that belongs to the component.

    With a gate in front of the component, c ∂L/∂c is the same number, and so is ⟨aᵢ, ∂L/∂aᵢ⟩: whichever
    tensor a layer offers, the score is one. AdaLoRA averages such products over every entry of its
    triplets; here they are summed before the absolute value is taken.

    Args:
        weight: B, A or gates, of one module or a stack of them; changed in place.
        gradient: ∂L/∂weight, the same shape; both from before the step.
        dims: the dimensions that run within a component; none for gates.

    Returns:
        ``weight`` without ``dims``: one number for each component.

    Examples:
        >>> b, g = torch.tensor([[2.0, -1.0], [1.0, 0.0]]), torch.tensor([[0.5, 3.0], [1.0, 9.0]])
        >>> component_sensitivities(b, g, dims=[0])
        tensor([ 2., -3.])
    """
    product = weight.mul_(gradient)
    return product.sum(list(dims)) if dims else product


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
        torch._foreach_lerp_(list(smoothed), list(importance), 1 - beta)
