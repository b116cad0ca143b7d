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
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.sharding import add_gradient_, is_sharded, needs_full_gradient, whole
from dynlora.health import can_look, check_importance

STACK_BYTES = 750_000
"""Upper limit of the copies that one stack makes; with ``GRAM_BYTES``, temporaries stay below 1 MB."""

GRAM_BYTES = 100_000
"""Upper limit of the Gram matrices held at once, in fp32."""


Score = Callable[[Sequence[GatedLayer], int], None]
"""Writes the components' scores into ``ema`` of each layer, after every step until the freeze; the number
is that of the steps done."""


def chosen_score(config: DynLoraConfig) -> Score:
    """The score that the config names: its importance, smoothed (Eq. 8).

    Where looking costs nothing, importance that is not finite is refused before it is smoothed.
    """
    present = _gate_scores if config.importance in _FROM_GATES else _norm_scores

    @torch.no_grad()
    def score(layers: Sequence[GatedLayer], step: int) -> None:
        emas = [m.ema for m in layers]
        found = [s for block in _blocks(layers) for s in present(block, config.importance)]
        if can_look(layers):
            check_importance([m.name for m in layers], found, step=step)
        scores = [s.to(e.dtype) for s, e in zip(found, emas, strict=True)]
        allocation.smooth_importance_(emas, scores, beta=config.ema_beta)

    return score


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


_FROM_GRAMS = {
    "share": allocation.component_importance,  # Eq. 7; adds up to about 1 in every module
    "norm": allocation.component_norms,  # modules that change more keep more
}


def _norm_scores(layers: Sequence[GatedLayer], importance: str) -> list[Tensor]:
    """Importance of every component from Gram matrices, one (rank,) tensor a module."""
    factors = [m.parameters for m in layers]
    grams_a = gram_matrices([a for a, _, _ in factors], rank_dim=0)
    grams_b = gram_matrices([b for _, b, _ in factors], rank_dim=1)
    found: list[Any] = [None] * len(layers)
    for rows in _groups(grams_a, lambda gram: (gram.shape[0], gram.dtype, gram.device)):
        gram_a = torch.stack([grams_a[i] for i in rows])
        gram_b = torch.stack([grams_b[i] for i in rows])
        gates = torch.stack([whole(factors[i][2]).detach() for i in rows]).to(gram_a.dtype)
        scores = _FROM_GRAMS[importance](gram_a, gram_b, gates)
        for i, score in zip(rows, scores.unbind(), strict=True):
            found[i] = score
    if importance == "norm":
        return list(torch._foreach_mul(found, [m.scaling for m in layers]))
    return found


def _gate(gated: GatedLayer) -> Tensor:
    """|cᵢ|: free to compute, and the norm itself where all aᵢ and bᵢ are of one length."""
    return whole(gated.gate).detach().abs()


def _sensitivity(gated: GatedLayer) -> Tensor:
    """|cᵢ ∂L/∂cᵢ| with the gradient of the step just made; 0 where the gate received none."""
    c = whole(gated.gate).detach()
    if gated.gate.grad is None:
        return torch.zeros_like(c)
    return allocation.component_sensitivity(c, whole(gated.gate.grad))


_FROM_GATES = {"gate": _gate, "sensitivity": _sensitivity}


def _gate_scores(layers: Sequence[GatedLayer], importance: str) -> list[Tensor]:
    return [_FROM_GATES[importance](gated) for gated in layers]


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
    layers: Sequence[GatedLayer], *, factor: float, grad_scale: Tensor | float | None = None
) -> None:
    """Add the gradient of ``factor`` · Σᵢ (Var(aᵢ) + Var(bᵢ)) to the layers' gradients, in place (Eq. 10).

    Args:
        layers: the gated layers of a model, none of them dropped.
        factor: η/n.
        grad_scale: what the gradients are multiplied by, a tensor on their device; None for 1.
    """
    for rank_dim in (0, 1):
        options: dict[str, Any] = {"rank_dim": rank_dim, "factor": factor, "grad_scale": grad_scale}
        weights = [m.parameters[rank_dim] for m in layers]
        for weight in [w for w in weights if needs_full_gradient(w)]:
            full = whole(weight).detach()
            penalty = torch.zeros_like(full)
            allocation.add_dem_gradients_([penalty], [full], **options)
            add_gradient_(weight, penalty)
        weights = [w for w in weights if not needs_full_gradient(w)]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for rows in _stacks(weights):
            allocation.add_dem_gradients_(
                [weights[i].grad for i in rows],  # type: ignore[misc]  # set above
                [weights[i].detach() for i in rows],
                **options,
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
