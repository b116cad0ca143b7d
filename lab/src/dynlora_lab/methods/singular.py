"""The components of a module as singular triplets of its update, with the optimizer's state."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from dynlora.lora.components import LoraComponents
from dynlora.lora.rotation import turn_


@torch.no_grad()
def to_singular_triplets_(module: LoraComponents, optimizer: Optimizer | None = None) -> None:
    """Make the live components of each pair κ v and σ u / κ of their product, largest first, in place.

    κ is the root mean square norm of A's rows, so that A stays as large as it was. A' = T A and
    B' = B T⁻¹ with T = κ Vᵀ R⁺ᵀ, where Aᵀ = Q R and U Σ Vᵀ is the singular value decomposition of B Rᵀ:
    the function stays the same, and leaving out the last components is the best approximation of lower
    rank (Eckart and Young). A layer too narrow for as many triplets keeps zeros in the last ones.

    Args:
        module: a stock LoRA whose pruned components are 0.
        optimizer: its state turns along: gradients of A turn by T⁻ᵀ and those of B by T, so first moments
            are exact and second moments approximate, as in ``dynlora.lora.rotation``.
    """
    live = module.live.nonzero().flatten()
    for a, b in module.pairs:
        rows = a.vectors(a.parameter.detach())[:, live]
        columns = b.vectors(b.parameter.detach())[:, live]
        for_a, for_b = (_among(live, module.rank, turns) for turns in _turns(rows, columns))
        turn_(a, for_a, for_b, optimizer)
        turn_(b, for_b, for_a, optimizer)


def squared_norms(module: LoraComponents) -> Tensor:
    """‖s b aᵀ‖² of each component, (rank,), summed over the pairs that share it."""
    norms = [
        a.vectors(a.parameter).double().norm(dim=2) * b.vectors(b.parameter).double().norm(dim=2)
        for a, b in module.pairs
    ]
    return (module.scaling or 1.0) ** 2 * sum(norm.square().sum(0) for norm in norms)


def _turns(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """T and T⁻ᵀ of each copy, (copies, rank, rank), from the vectors of A and of B."""
    rank = rows.shape[1]
    right = torch.linalg.qr(rows.double().mT).R  # (copies, min(rank, in), rank)
    _, left = torch.linalg.qr(columns.double().mT)
    _, _, vt = torch.linalg.svd(left @ right.mT, full_matrices=False)
    size = rows.double().square().sum(2).mean(1).sqrt()[:, None, None]
    size = torch.where(size > 0, size, torch.ones_like(size))
    for_a = size * vt @ torch.linalg.pinv(right).mT
    for_b = vt @ right / size
    padding = (0, 0, 0, rank - vt.shape[1])
    return pad(for_a, padding), pad(for_b, padding)


def _among(live: Tensor, rank: int, turns: Tensor) -> Tensor:
    """The turns of the components ``live``, with all others left as they are."""
    whole = torch.eye(rank, dtype=turns.dtype, device=turns.device).repeat(len(turns), 1, 1)
    whole[:, live[:, None], live] = turns
    return whole
