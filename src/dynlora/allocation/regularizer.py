"""The Dimensional Equilibrium Modulator, DEM (paper Eq. 10): a penalty on uneven components.

A component with a few large entries can have a small norm, be pruned, and still disturb those
dimensions. DEM keeps the entries of every aᵢ and bᵢ close to each other.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def dem_penalty(vectors: Iterable[Tensor], num_components: int) -> Tensor:
    """Mean variance of the components' vectors.

    R = (1/n) Σᵢ (Var(aᵢ) + Var(bᵢ)), with unbiased variances                  [Eq. 10]

    The official code divides by 2n; the paper, and we, by n.

    Args:
        vectors: matrices whose rows are the vectors: A (rank, in) and Bᵀ (rank, out) of every module.
        num_components: n, components in the whole model.

    Returns:
        A scalar with gradient; a vector of one entry has variance 0.

    >>> dem_penalty([torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0, 2.0]])], 1)
    tensor(2.)
    """
    terms = [rows.var(dim=1).sum() for rows in vectors if rows.shape[1] > 1]
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() / num_components


def add_dem_gradient_(grad: Tensor, weight: Tensor, *, rank_dim: int, factor: float) -> None:
    """Add the gradient of ``factor`` · Σᵢ Var(wᵢ) to ``grad``, in place.

    ∂ Var(w) / ∂w = 2 (w − w̄) / (d − 1), d = len(w)                            [gradient of Eq. 10]

    With factor = η/n this is what autograd gives for η·R; no copy of the weight is made.

    Args:
        grad: gradient to add to, the shape of ``weight``.
        weight: A (rank, in, ...) with rank_dim=0, or B (out, rank, ...) with rank_dim=1.
        rank_dim: the dimension that counts components; a vector runs over all the others.
        factor: η/n, times the loss scale if ``grad`` is scaled.

    >>> grad = torch.zeros(1, 3)
    >>> add_dem_gradient_(grad, torch.tensor([[1.0, 2.0, 6.0]]), rank_dim=0, factor=0.5)
    >>> grad
    tensor([[-1.0000, -0.5000,  1.5000]])
    """
    rank = weight.shape[rank_dim]
    length = weight.numel() // max(rank, 1)
    if length < 2:
        return
    others = [dim for dim in range(weight.ndim) if dim != rank_dim]
    slope = 2 * factor / (length - 1)
    grad.add_(weight, alpha=slope)
    grad.sub_(weight.mean(dim=others, keepdim=True), alpha=slope)
