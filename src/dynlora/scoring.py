"""Score all modules of a model, and add DEM to all their gradients, in a few batched operations.

Vectors of equal length are stacked, up to a limit at a time: the number of operations grows with the
bytes of the adapter, not with the number of modules, and no temporary is larger. Nothing here waits for
the device.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dynlora import allocation
from dynlora.adapter.components import GatedLayer
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.sharding import (
    add_gradient_,
    full_gradient,
    full_shape,
    is_sharded,
    needs_full_gradient,
    whole,
)
from dynlora.health import can_look, check_importance


class Limits(NamedTuple):
    """Bytes of temporaries; small ones keep a CPU's caches, large ones need few kernel launches."""

    stack: int  # the copies that one stack makes
    grams: int  # the Gram matrices held at once, in fp32


ON_CPU = Limits(stack=375_000, grams=100_000)
"""Temporaries stay below 1 MB: stacking transposed factors takes as much again."""

ON_ACCELERATOR = Limits(stack=64_000_000, grams=8_000_000)
"""The update of a foreach optimizer needs as much; an adapter of 32 MB is scored in one go."""


def limits_of(tensor: Tensor) -> Limits:
    """What temporaries may cost where ``tensor`` lies."""
    return ON_CPU if tensor.device.type == "cpu" else ON_ACCELERATOR


_WEIGHTS = "its adapter weights, which are not finite"

Score = Callable[[Sequence[GatedLayer], int], None]
"""Writes the components' scores into ``ema`` of each layer, after every step until the freeze; the number
is that of the steps done."""


class Scorer(Protocol):
    """What the allocator asks for scores."""

    name: str

    def before_step(self, layers: Sequence[GatedLayer], grad_scale: Tensor | float | None) -> None:
        """Take what does not outlive the step; gradients are multiplied by ``grad_scale``, None for 1."""

    def __call__(self, layers: Sequence[GatedLayer], step: int) -> None:
        """Write scores into ``ema`` of each layer after a step."""

    def check(self, layers: Sequence[GatedLayer], step: int) -> None:
        """Refuse scores that nothing can be decided by."""


def scorer(config: DynLoraConfig, score: Score | None) -> Scorer:
    """The user's function, or the importance that the config names.

    Raises:
        TypeError: ``score`` is no function.
    """
    return ImportanceScore(config) if score is None else OwnScore(score)


class OwnScore:
    """A function of the user's own, with the mistakes that can be seen from outside."""

    name = "own"

    def __init__(self, score: Score) -> None:
        if not callable(score):
            raise TypeError(
                f"score={score!r} must be a function (layers, step) that writes into layer.ema. One of "
                f"ours is chosen by name: DynLoraConfig(importance={score!r})."
            )
        self.score = score

    def before_step(self, layers: Sequence[GatedLayer], grad_scale: Tensor | float | None) -> None:
        """Nothing: the function is called after the step only."""

    def __call__(self, layers: Sequence[GatedLayer], step: int) -> None:
        """Call the function.

        Raises:
            TypeError: it returns its scores instead of writing them.
        """
        returned: object = self.score(layers, step)
        if returned is not None:
            raise TypeError(
                f"score returned a {type(returned).__name__}, which nobody reads: it must write into the "
                "layers, layer.ema.copy_(...) for each of them, and return None."
            )

    def check(self, layers: Sequence[GatedLayer], step: int) -> None:
        """Refuse scores that were never written, or are not finite.

        Raises:
            ValueError: all are 0.
            FloatingPointError: one is NaN or infinite.
        """
        if not any(bool(m.ema.any()) for m in layers):
            raise ValueError(
                f"score has left every layer.ema at 0 after {step} steps, so modules would be kept for "
                "standing first. Write into the layers, layer.ema.copy_(...) for each of them."
            )
        check_importance(
            [m.name for m in layers],
            [m.ema for m in layers],
            step=step,
            cause="your score function",
        )


class ImportanceScore:
    """The importance that the config names, smoothed (Eq. 8).

    Where looking costs nothing, importance that is not finite is refused before it is smoothed.
    """

    def __init__(self, config: DynLoraConfig) -> None:
        self.name: str = config.importance
        self.beta = config.ema_beta
        self._gathered: dict[str, Tensor | None] = {}  # gradients of gates, by module

    def before_step(self, layers: Sequence[GatedLayer], grad_scale: Tensor | float | None) -> None:
        """Take gradients that do not outlive the step (FSDP1, ZeRO), if the importance reads them.

        Args:
            layers: the gated layers of a model, none of them dropped.
            grad_scale: what the gradients are multiplied by; None for 1.
        """
        if self.name != "sensitivity" or not needs_full_gradient(layers[0].gate):
            return
        gradients = {m.name: full_gradient(m.gate) for m in layers}
        if grad_scale is not None:
            # not in place: the gradient may be the very one the step will use
            gradients = {n: None if g is None else g / grad_scale for n, g in gradients.items()}
        self._gathered = gradients

    @torch.no_grad()
    def __call__(self, layers: Sequence[GatedLayer], step: int) -> None:
        """Smooth the importance after a step into ``ema`` of each layer."""
        emas = [m.ema for m in layers]
        found = [s for block in _blocks(layers) for s in self._present(block)]
        if can_look(layers):
            check_importance([m.name for m in layers], found, step=step, cause=_WEIGHTS)
        scores = [s.to(e.dtype) for s, e in zip(found, emas, strict=True)]
        allocation.smooth_importance_(emas, scores, beta=self.beta)

    def check(self, layers: Sequence[GatedLayer], step: int) -> None:
        """Refuse smoothed importance that is not finite.

        Raises:
            FloatingPointError: it is NaN or infinite somewhere.
        """
        names, emas = [m.name for m in layers], [m.ema for m in layers]
        check_importance(names, emas, step=step, cause=_WEIGHTS)

    def _present(self, layers: Sequence[GatedLayer]) -> list[Tensor]:
        if self.name in _OF_PRODUCTS:
            return _product_scores(layers, self.name)
        gates = [whole(m.gate).detach() for m in layers]
        if self.name == "gate":
            return list(torch._foreach_abs(gates))
        gathered = self._gathered or {m.name: full_gradient(m.gate) for m in layers}
        gradients = [
            torch.zeros_like(c) if (gradient := gathered[m.name]) is None else gradient
            for m, c in zip(layers, gates, strict=True)
        ]
        return allocation.component_sensitivities(gates, gradients)


def _blocks(layers: Sequence[GatedLayer]) -> Iterator[list[GatedLayer]]:
    """The layers in order, as many at a time as the limit of Gram matrices allows, at least one."""
    limit = limits_of(layers[0].ema).grams
    block: list[GatedLayer] = []
    size = 0
    for gated in layers:
        need = 2 * 4 * gated.num_components**2
        if block and size + need > limit:
            yield block
            block, size = [], 0
        block.append(gated)
        size += need
    yield block


_OF_PRODUCTS = {
    "share": allocation.component_importance,  # Eq. 7; adds up to about 1 in every module
    "norm": allocation.component_norms,  # modules that change more keep more
}


def _product_scores(layers: Sequence[GatedLayer], importance: str) -> list[Tensor]:
    """Importance of every component from Gram matrices, one (rank,) tensor a module."""
    of_products = _OF_PRODUCTS[importance]
    factors = [m.parameters for m in layers]
    grams = gram_matrices([(a, 0) for a, _, _ in factors] + [(b, 1) for _, b, _ in factors])
    grams_a, grams_b = grams[: len(layers)], grams[len(layers) :]
    found: list[Any] = [None] * len(layers)
    for rows in _groups([(gram.shape[0], gram.dtype, gram.device) for gram in grams_a]):
        gram_a = torch.stack([grams_a[i] for i in rows])
        gram_b = torch.stack([grams_b[i] for i in rows])
        gates = torch.stack([whole(factors[i][2]).detach() for i in rows]).to(gram_a.dtype)
        scores = of_products(allocation.component_products(gram_a, gram_b, gates))
        for i, score in zip(rows, scores.unbind(), strict=True):
            found[i] = score
    if importance == "norm":
        return list(torch._foreach_mul(found, [m.scaling for m in layers]))
    return found


Factor = tuple[Tensor, int]
"""A weight and its dimension that counts components: A (rank, in, ...) and 0, B (out, rank, ...) and 1."""


@torch.no_grad()
def gram_matrices(factors: Sequence[Factor]) -> list[Tensor]:
    """Inner products of the components' vectors in each factor, in fp32 at least.

    Returns:
        A Aᵀ or Bᵀ B of every factor, (rank, rank) each, in the order of ``factors``.

    >>> gram_matrices([(torch.eye(2), 0), (2 * torch.eye(2), 1)])[1]
    tensor([[4., 0.],
            [0., 4.]])
    """
    grams: list[Any] = [None] * len(factors)
    weights = [weight for weight, _ in factors]
    for rows in _stacks(weights, [(full_shape(w)[dim], w.numel()) for w, dim in factors]):
        if len(rows) == 1:
            weight, rank_dim = factors[rows[0]]
            grams[rows[0]] = _gram(_vectors(whole(weight), rank_dim))
            continue
        stack = _at_least_fp32(torch.stack([_vectors(*factors[i]) for i in rows]))
        for i, gram in zip(rows, torch.bmm(stack, stack.mT).unbind(), strict=True):
            grams[i] = gram
    return grams


def _vectors(weight: Tensor, rank_dim: int) -> Tensor:
    """The components' vectors as rows, (rank, length)."""
    matrix = weight.flatten(1)
    return matrix if rank_dim == 0 else matrix.mT


def _gram(vectors: Tensor) -> Tensor:
    """The Gram matrix of one factor; one that must be converted is taken in slices."""
    if vectors.dtype in {torch.float32, torch.float64}:
        return vectors @ vectors.mT
    rank = vectors.shape[0]
    gram = torch.zeros(rank, rank, device=vectors.device)
    for part in vectors.split(max(1, limits_of(vectors).stack // (4 * max(1, rank))), dim=1):
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
        for rows in _stacks(weights, [w.shape for w in weights]):
            allocation.add_dem_gradients_(
                [weights[i].grad for i in rows],  # type: ignore[misc]  # set above
                [weights[i].detach() for i in rows],
                **options,
            )


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _stacks(tensors: Sequence[Tensor], kinds: Sequence[Hashable]) -> Iterator[list[int]]:
    """Indices of tensors of one kind that make a stack up to the limit, in fp32; at least one each."""
    for rows in _groups([(k, t.dtype, t.device) for k, t in zip(kinds, tensors, strict=True)]):
        first = tensors[rows[0]]
        width = first.element_size()
        size = first.numel() * (width if width >= 4 else width + 4)  # converted to fp32
        step = 1 if is_sharded(first) else max(1, limits_of(first).stack // max(1, size))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def _groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance."""
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return list(groups.values())
