"""Score all modules of a model, and add DEM to all their gradients, in a few batched operations.

Factors of equal shape are stacked, up to ``STACK_BYTES`` at a time: the number of operations grows with
the bytes of the adapter, not with the number of modules, and no temporary is larger. Nothing here waits
for the device.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora import allocation
from dynlora.adapter.components import GatedLayer
from dynlora.adapter.sharding import is_sharded, whole

STACK_BYTES = 750_000
"""Upper limit of the copies that one stack makes; with ``GRAM_BYTES``, temporaries stay below 1 MB."""

GRAM_BYTES = 100_000
"""Upper limit of the Gram matrices held at once, in fp32."""


@torch.no_grad()
def score_(layers: Sequence[GatedLayer], *, beta: float) -> None:
    """Move the smoothed importance of every component towards its present one (Eq. 7 and 8).

    Args:
        layers: the gated layers of a model, none of them dropped; their ``ema`` is changed in place.
        beta: weight of the past, in [0, 1).
    """
    for block in _blocks(layers):
        factors = [m.parameters for m in block]
        emas = [m.ema for m in block]
        shares = _importance([[p.detach() for p in f] for f in factors])
        present = [s.to(e.dtype) for s, e in zip(shares, emas, strict=True)]
        allocation.smooth_importance_(emas, present, beta=beta)


def _blocks(layers: Sequence[GatedLayer]) -> Iterator[list[GatedLayer]]:
    """The layers in order, as many at a time as ``GRAM_BYTES`` allows, at least one."""
    block: list[GatedLayer] = []
    size = 0
    for gated in layers:
        need = 2 * 4 * gated.num_components**2
        if block and size + need > GRAM_BYTES:
            yield block
            block, size = [], 0
        block.append(gated)
        size += need
    yield block


def _importance(factors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Eq. 7 for modules given as (A, B, c): (rank,) each, those of equal rank in one batch."""
    grams_a = gram_matrices([a for a, _, _ in factors], rank_dim=0)
    grams_b = gram_matrices([b for _, b, _ in factors], rank_dim=1)
    shares: list[Any] = [None] * len(factors)
    for rows in _groups(grams_a, lambda g: (g.shape, g.dtype, g.device)):
        gates = torch.stack([whole(factors[i][2]) for i in rows])
        gram_a = torch.stack([grams_a[i] for i in rows])
        gram_b = torch.stack([grams_b[i] for i in rows])
        shared = allocation.component_importance(gram_a, gram_b, gates.to(gram_a.dtype))
        for i, share in zip(rows, shared.unbind(), strict=True):
            shares[i] = share
    return shares


@torch.no_grad()
def gram_matrices(factors: Sequence[Tensor], *, rank_dim: int) -> list[Tensor]:
    """Inner products of the components' vectors in each factor, in fp32 at least.

    Args:
        factors: A (rank, in, ...) of every module with rank_dim=0, or B (out, rank, ...) with rank_dim=1.
        rank_dim: the dimension that counts components.

    Returns:
        A Aᵀ or Bᵀ B of every factor, (rank, rank) each, in the order of ``factors``.

    >>> gram_matrices([torch.eye(2), 2 * torch.eye(2)], rank_dim=0)[1]
    tensor([[4., 0.],
            [0., 4.]])
    """
    grams: list[Any] = [None] * len(factors)
    for rows in _stacks(factors):
        if len(rows) == 1:
            grams[rows[0]] = _gram(whole(factors[rows[0]]), rank_dim)
            continue
        for i, gram in zip(rows, _grams([factors[i] for i in rows], rank_dim), strict=True):
            grams[i] = gram
    return grams


def _grams(factors: Sequence[Tensor], rank_dim: int) -> Sequence[Tensor]:
    """The Gram matrices of several factors of one shape."""
    stack = _at_least_fp32(torch.stack([factor.flatten(1) for factor in factors]))
    vectors = stack if rank_dim == 0 else stack.mT
    return torch.bmm(vectors, vectors.mT).unbind()


def _gram(factor: Tensor, rank_dim: int) -> Tensor:
    """The Gram matrix of one factor; one that must be converted is taken in slices."""
    matrix = factor.flatten(1)
    if rank_dim == 1:
        matrix = matrix.T
    if matrix.dtype in {torch.float32, torch.float64}:
        return matrix @ matrix.T
    width = max(1, STACK_BYTES // (4 * max(1, matrix.shape[0])))
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], device=matrix.device)
    for part in matrix.split(width, dim=1):
        exact = part.float()
        gram.addmm_(exact, exact.T)
    return gram


@torch.no_grad()
def add_dem_gradients_(
    layers: Sequence[GatedLayer], *, factor: float, grad_scale: Tensor | None = None
) -> None:
    """Add the gradient of ``factor`` · Σᵢ (Var(aᵢ) + Var(bᵢ)) to the layers' gradients, in place (Eq. 10).

    Args:
        layers: the gated layers of a model, none of them dropped.
        factor: η/n.
        grad_scale: what the gradients are multiplied by, on their device; None for 1.
    """
    for rank_dim in (0, 1):
        weights = [m.parameters[rank_dim] for m in layers]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for rows in _stacks(weights):
            allocation.add_dem_gradients_(
                [weights[i].grad for i in rows],  # type: ignore[misc]  # set above
                [weights[i].detach() for i in rows],
                rank_dim=rank_dim,
                factor=factor,
                grad_scale=grad_scale,
            )


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _stacks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors that make a stack of up to ``STACK_BYTES`` in fp32, at least one each."""
    for rows in _groups(tensors, lambda t: (t.shape, t.dtype, t.device)):
        width = tensors[rows[0]].element_size()
        size = tensors[rows[0]].numel() * (width if width >= 4 else width + 4)  # converted to fp32
        step = 1 if is_sharded(tensors[rows[0]]) else max(1, STACK_BYTES // max(1, size))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def _groups(tensors: Sequence[Tensor], key: Callable[[Tensor], Hashable]) -> list[list[int]]:
    """Indices of the tensors that share a key, in order of first appearance."""
    groups = defaultdict(list)
    for i, tensor in enumerate(tensors):
        groups[key(tensor)].append(i)
    return list(groups.values())
