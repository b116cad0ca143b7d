"""Components as triplets of B A in two metrics, its singular value decomposition among them.

With L and R, positive definite (rank, rank), the change of basis A' = T A, B' = B T⁻¹ leaves B A as it is
and makes T⁻ᵀ L T⁻¹ and T R Tᵀ diagonal: what keeps the first k components is the nearest M of rank k to I
in ‖L^½ (I − M) R^½‖. With L = BᵀB and R = A Aᵀ these are the singular triplets of B A (Eckart, Young).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlora.lora.components import Factor, LoraComponents
from dynlora.lora.rotation import turn_

_DAMPING = 1e-6
"""Added to L and R, which are scaled to a mean eigenvalue of 1 before, so that both are definite."""


@torch.no_grad()
def to_singular_(
    module: LoraComponents,
    optimizer: Optimizer | None = None,
    copies: Sequence[LoraComponents] = (),
) -> Tensor:
    """Make the components of each of the module's pairs singular triplets, largest first, in place.

    Scores of the module mean nothing afterwards and are set to 0.

    Args:
        module: a stock LoRA, not sharded.
        optimizer: its state turns along, as ``dynlora.lora.rotation.rotate_`` says.
        copies: the same module of copies of the model, which turn along.

    Returns:
        (s·σ)² of each component, (rank,), summed over the pairs that share it.
    """
    squares = torch.zeros(module.rank, dtype=torch.float64, device=module.ema.device)
    for i, (a, b) in enumerate(module.pairs):
        rows, columns = (f.vectors(f.parameter.detach()).double() for f in (a, b))
        along = [copy.pairs[i] for copy in copies]
        found = turn_pair_((a, b), columns @ columns.mT, rows @ rows.mT, optimizer, along)
        squares += found.sum(0).to(squares.device)
    module.ema.zero_()
    return (module.scaling or 1.0) ** 2 * squares


@torch.no_grad()
def turn_pair_(
    pair: tuple[Factor, Factor],
    left: Tensor,
    right: Tensor,
    optimizer: Optimizer | None,
    copies: Sequence[tuple[Factor, Factor]] = (),
) -> Tensor:
    """Turn A and B of one pair into the triplets of L and R, in place.

    The rows of A get the length that they had in the mean.

    Args:
        pair: A and B.
        left: L, (copies, rank, rank), in float64.
        right: R.
        optimizer: whose state turns along.
        copies: the same pair in copies of the model, which turn along.

    Returns:
        σ² of each triplet, (copies, rank), falling.
    """
    a, _ = pair
    for_a, for_b, squares = triplets(left, right)
    rows = a.vectors(a.parameter.detach()).double()
    lengths = (for_a @ rows).norm(dim=2, keepdim=True)
    mean = rows.square().sum(2).mean(1).sqrt()[:, None, None].expand_as(lengths)
    size = torch.where((lengths > 0) & (mean > 0), mean / lengths, torch.ones_like(lengths))
    for_a, for_b = size * for_a, for_b / size
    for (one, other), whose in [(pair, optimizer), *((copy, None) for copy in copies)]:
        turn_(one, for_a, for_b, whose)
        turn_(other, for_b, for_a, whose)
    return squares


def triplets(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T, T⁻ᵀ and σ² of L^½ R^½ = U Σ Vᵀ, each by copy.

    Cholesky factors do what the roots do: with L = K Kᵀ and R = H Hᵀ the singular values of Kᵀ H are the
    same, and T = Vᵀ H⁻¹.

    Args:
        left: L, (copies, rank, rank).
        right: R.

    Returns:
        T and T⁻ᵀ, (copies, rank, rank), and σ², (copies, rank), falling; 0 where L or R is 0.

    >>> left = right = torch.tensor([[[4.0, 0.0], [0.0, 9.0]]], dtype=torch.float64)
    >>> triplets(left, right)[2].round(decimals=2)
    tensor([[81., 16.]], dtype=torch.float64)
    """
    rank = left.shape[1]
    identity = torch.eye(rank, dtype=left.dtype, device=left.device)
    means = [m.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] for m in (left, right)]
    k, h = (
        torch.linalg.cholesky(matrix / torch.where(mean > 0, mean, 1.0) + _DAMPING * identity)
        for matrix, mean in zip((left, right), means, strict=True)
    )
    _, sigma, vt = torch.linalg.svd(k.mT @ h)
    for_a = torch.linalg.solve_triangular(h, vt, upper=False, left=False)
    return for_a, vt @ h.mT, sigma.square() * (means[0] * means[1]).squeeze(2)
