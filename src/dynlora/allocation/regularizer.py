"""The Dimensional Equilibrium Modulator, DEM (paper Eq. 10): a penalty on uneven components.

A component with a few large entries can have a small norm, be pruned, and still disturb those
dimensions. DEM keeps the entries of every aᵢ and bᵢ close to each other.
"""

from collections.abc import Iterable, Sequence

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

    Examples:
        >>> dem_penalty([torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0, 2.0]])], 1)
        tensor(2.)
    """
    terms = [rows.var(dim=1).sum() for rows in vectors if rows.shape[1] > 1]
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() / num_components


def add_dem_gradients_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    rank_dim: int,
    factor: float,
    grad_scale: Tensor | float | None = None,
) -> None:
    """Add the gradient of ``factor`` · Σᵢ Var(wᵢ) to the gradients of equally shaped weights, in place.

    ∂ Var(w) / ∂w = 2 (w − w̄) / (d − 1), d = len(w)                            [gradient of Eq. 10]

    With factor = η/n this is what autograd gives for η·R. Several weights are copied into one stack; a
    single one is not copied.

    Args:
        grads: gradients to add to, the shapes of ``weights``.
        weights: A (rank, in, ...) with rank_dim=0, or B (out, rank, ...) with rank_dim=1.
        rank_dim: the dimension that counts components; a vector runs over all the others.
        factor: η/n.
        grad_scale: what the gradients are multiplied by, a scalar on their device; None for 1.

    Examples:
        >>> grad = torch.zeros(1, 3)
        >>> add_dem_gradients_([grad], [torch.tensor([[1.0, 2.0, 6.0]])], rank_dim=0, factor=0.5)
        >>> grad
        tensor([[-1.0000, -0.5000,  1.5000]])
    """
    shape = weights[0].shape
    length = weights[0].numel() // max(shape[rank_dim], 1)
    if length < 2:
        return
    slope = 2 * factor / (length - 1)
    others = [dim for dim in range(len(shape)) if dim != rank_dim]
    if len(weights) == 1:
        weight = weights[0] if grad_scale is None else weights[0] * grad_scale
        grads[0].add_(weight, alpha=slope)
        grads[0].sub_(weight.mean(dim=others, keepdim=True), alpha=slope)
        return
    stack = torch.stack(list(weights))
    stack.sub_(stack.mean(dim=[dim + 1 for dim in others], keepdim=True))
    if grad_scale is not None:
        stack.mul_(grad_scale)
    torch._foreach_add_(list(grads), list(stack.unbind()), alpha=slope)
