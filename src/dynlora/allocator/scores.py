"""Who scores the components: the importance that the settings name, or a function of the user's own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from dynlora import allocation
from dynlora.allocation import Settings
from dynlora.allocator.checks import check_scores
from dynlora.allocator.stacks import groups, limits_of, stacks
from dynlora.lora.components import Factor, LoraComponents
from dynlora.lora.sharding import (
    full_gradient,
    full_shape,
    full_tensor,
    is_zero_parameter,
    local_part,
)

Score = Callable[[Sequence[LoraComponents], int], None]
"""Writes the components' scores into ``ema`` of each module, after every step until the freeze; the
number is that of the steps done."""


class OwnScore:
    """A function of the user's own, with the mistakes that can be seen from outside."""

    name = "own"

    def __init__(self, score: Score) -> None:
        if not callable(score):
            raise TypeError(
                f"score={score!r} must be a function (modules, step) that writes into module.ema. A "
                f"built-in one is chosen by name: importance={score!r}."
            )
        self.score = score

    def before_step(
        self, modules: Sequence[LoraComponents], grad_scale: Tensor | float | None
    ) -> None:
        """Nothing: the function is called after the step only."""

    def __call__(self, modules: Sequence[LoraComponents], step: int) -> None:
        """Call the function; TypeError if it returns its scores instead of writing them."""
        returned: object = self.score(modules, step)
        if returned is not None:
            raise TypeError(
                f"score must return None, not {type(returned).__name__}: write the scores into the "
                "modules, module.ema.copy_(...) for each of them."
            )

    def check(self, modules: Sequence[LoraComponents], step: int) -> None:
        """Refuse scores that were never written, are not finite, or below 0, where the pruned stand."""
        never = "your score function wrote into no module.ema. Call module.ema.copy_(...) for each module"
        check_scores(modules, step=step, if_zero=never, if_not_finite="your score function")
        lowest = min((m for m in modules if m.rank), key=lambda m: float(m.ema.min()))
        if float(lowest.ema.min()) < 0:
            raise ValueError(
                f"score wrote {float(lowest.ema.min()):.3g} into module.ema of {lowest.name!r} at step "
                f"{step}: scores must be 0 or more, the most important highest. Add a constant, or take "
                "absolute values."
            )


class ImportanceScore:
    """The importance that the settings name, smoothed (Eq. 8).

    Sensitivity is read before the step, from the weights and the gradient as they are then; share and
    norm after it, from the weights alone.
    """

    def __init__(self, settings: Settings) -> None:
        self.name: str = settings.importance
        self.beta = settings.ema_beta
        self._sensitivities: list[Tensor] = []  # of the coming step, in the order of the modules

    @torch.no_grad()
    def before_step(
        self, modules: Sequence[LoraComponents], grad_scale: Tensor | float | None
    ) -> None:
        """Read the sensitivities of the coming step, whose gradients are scaled up by ``grad_scale``."""
        if self.name == "sensitivity":
            found = sensitivities(modules)
            self._sensitivities = found if grad_scale is None else [s / grad_scale for s in found]

    @torch.no_grad()
    def __call__(self, modules: Sequence[LoraComponents], step: int) -> None:
        """Smooth the importance of the step that was made into ``ema`` of each module."""
        scores = self._sensitivities if self.name == "sensitivity" else norms(modules, self.name)
        emas = [m.ema for m in modules]
        scores = [s.to(e.dtype) for s, e in zip(scores, emas, strict=True)]
        for rows in groups([e.device for e in emas]):
            allocation.smooth_importance_(
                [emas[i] for i in rows], [scores[i] for i in rows], beta=self.beta
            )

    def check(self, modules: Sequence[LoraComponents], step: int) -> None:
        """Refuse smoothed importance that nothing can be decided by."""
        no_gradient = (
            "the adapter's weights have no gradient when optimizer.step() begins. Unfreeze the adapter, "
            "and clear gradients before the backward pass, not inside step()"
        )
        weights = "its adapter weights, which are not finite"
        check_scores(modules, step=step, if_zero=no_gradient, if_not_finite=weights)


@torch.no_grad()
def sensitivities(modules: Sequence[LoraComponents]) -> list[Tensor]:
    """|⟨bᵢ, ∂L/∂bᵢ⟩| of every component, one (rank,) tensor a module; 0 where there is no gradient."""
    probes = [(i, probe) for i, m in enumerate(modules) for probe in m.probes]
    terms = _signed_sums([probe for _, probe in probes])
    sums: list[Tensor | None] = [None] * len(modules)
    for (i, _), term in zip(probes, terms, strict=True):
        held = sums[i]
        sums[i] = term if held is None else held + term
    return list(torch._foreach_abs([s for s in sums if s is not None]))


def _signed_sums(probes: Sequence[Factor]) -> list[Tensor]:
    """⟨bᵢ, ∂L/∂bᵢ⟩ of every component of each factor, (rank,) each, in fp32 at least."""
    weights, gradients = zip(*(_weight_and_gradient(p) for p in probes), strict=True)
    kinds = [(w.shape, p.dim, p.copies, p.is_grouped) for w, p in zip(weights, probes, strict=True)]
    found: list[Tensor] = [torch.zeros(0)] * len(probes)
    for rows in stacks(weights, kinds):
        probe = probes[rows[0]]
        exact = torch.promote_types(weights[rows[0]].dtype, torch.float32)
        weight = torch.stack([weights[i] for i in rows]).to(exact)
        gradient = torch.stack([gradients[i] for i in rows]).to(exact)
        within = [d + 1 for d in range(weight.ndim - 1) if d != probe.dim]
        sums = allocation.component_sensitivities(weight, gradient, dims=within)
        if probe.copies > 1:
            shape = (probe.copies, -1) if probe.is_grouped else (-1, probe.copies)
            sums = sums.view(len(rows), *shape).sum(1 if probe.is_grouped else 2)
        del weight, gradient  # before the next stack is made
        for i, row in zip(rows, sums.unbind(), strict=True):
            found[i] = row
    return _summed_over_shards(probes, found)


def _weight_and_gradient(probe: Factor) -> tuple[Tensor, Tensor]:
    """What this process holds of both."""
    parameter = probe.parameter
    if is_zero_parameter(parameter) or _splits_components(probe):
        weight, gradient = full_tensor(parameter).detach(), full_gradient(parameter)
    else:
        weight, gradient = local_part(parameter.detach()), parameter.grad
        gradient = None if gradient is None else local_part(gradient.detach())
    return weight, torch.zeros_like(weight) if gradient is None else gradient


def _splits_components(probe: Factor) -> bool:
    """Whether FSDP2 gave each process some of the components, as it does with gates."""
    parameter = probe.parameter
    return isinstance(parameter, DTensor) and any(
        p.is_shard(probe.dim) for p in parameter.placements
    )


def _summed_over_shards(probes: Sequence[Factor], sums: list[Tensor]) -> list[Tensor]:
    """The sums over whole tensors, where FSDP2 gave each process some rows: one collective call."""
    places = [
        (p.parameter.device_mesh, p.parameter.placements)
        if isinstance(p.parameter, DTensor) and not _splits_components(p)
        else None
        for p in probes
    ]
    for rows in groups(places):
        if (place := places[rows[0]]) is None:
            continue
        mesh, placements = place
        kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
        part = torch.cat([sums[i] for i in rows])
        full = DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor()
        for i, row in zip(rows, full.split([len(sums[i]) for i in rows]), strict=True):
            sums[i] = row
    return sums


def norms(modules: Sequence[LoraComponents], importance: str) -> list[Tensor]:
    """``share`` (Eq. 7) or ``norm`` of every component, one (rank,) tensor a module."""
    return [score for block in _blocks(modules) for score in _norms_of(block, importance)]


def _blocks(modules: Sequence[LoraComponents]) -> Iterator[list[LoraComponents]]:
    """The modules in order, as many at a time as the limit of Gram matrices allows, at least one."""
    limit = limits_of(modules[0].ema).grams
    block: list[LoraComponents] = []
    size = 0
    for module in modules:
        need = 2 * 4 * module.rank**2 * sum(a.copies for a, _ in module.pairs)
        if block and size + need > limit:
            yield block
            block, size = [], 0
        block.append(module)
        size += need
    yield block


def _norms_of(modules: Sequence[LoraComponents], importance: str) -> list[Tensor]:
    """As ``norms``; modules of one shape are computed as one stack."""
    pairs = [pair for m in modules for pair in m.pairs]
    grams_a = gram_matrices([a for a, _ in pairs])
    grams_b = gram_matrices([b for _, b in pairs])
    places = iter(range(len(pairs)))
    places_of = [[next(places) for _ in m.pairs] for m in modules]
    kinds = [
        (tuple(grams_a[p].shape for p in own), grams_a[own[0]].dtype, m.ema.device, m.gate is None)
        for m, own in zip(modules, places_of, strict=True)
    ]
    found: list[Tensor] = [torch.zeros(0)] * len(modules)
    for rows in groups(kinds):
        total: Any = 0
        for own in zip(*(places_of[i] for i in rows), strict=True):
            a, b = (torch.stack([grams[p] for p in own]) for grams in (grams_a, grams_b))
            total = total + (a * b).sum(1)  # pairs act on other outputs: squares of norms add
        gates = [full_tensor(g).detach() for i in rows if (g := modules[i].gate) is not None]
        stacked = torch.stack(gates).to(total.dtype) if gates else None
        products = allocation.component_products(total, torch.ones_like(total), stacked)
        if importance == "share":
            scores = allocation.component_importance(products)
        else:
            scalings = [modules[i].scaling or 1.0 for i in rows]
            scores = allocation.component_norms(products) * total.new_tensor(scalings)[:, None]
        for i, row in zip(rows, scores.unbind(), strict=True):
            found[i] = row
    return found


@torch.no_grad()
def gram_matrices(factors: Sequence[Factor]) -> list[Tensor]:
    """A Aᵀ or Bᵀ B of each factor, (copies, rank, rank), in fp32 at least."""
    weights = [f.parameter for f in factors]
    kinds = [
        (full_shape(w), f.dim, f.copies, f.is_grouped)
        for w, f in zip(weights, factors, strict=True)
    ]
    grams: list[Tensor] = [torch.zeros(0)] * len(factors)
    for rows in stacks(weights, kinds):
        vectors = [factors[i].vectors(full_tensor(weights[i]).detach()) for i in rows]
        if len(rows) == 1:
            grams[rows[0]] = _gram(vectors[0])
            continue
        stack = torch.stack(vectors)
        stack = stack if stack.dtype == torch.float64 else stack.float()
        for i, gram in zip(rows, (stack @ stack.mT).unbind(), strict=True):
            grams[i] = gram
    return grams


def _gram(vectors: Tensor) -> Tensor:
    """The Gram matrices of one factor; vectors that must be converted are taken in slices."""
    if vectors.dtype in {torch.float32, torch.float64}:
        return vectors @ vectors.mT
    copies, rank, _ = vectors.shape
    gram = torch.zeros(copies, rank, rank, device=vectors.device)
    length = max(1, limits_of(vectors).stack // (4 * max(1, copies * rank)))
    for part in vectors.split(length, dim=2):
        exact = part.float()
        gram.baddbmm_(exact, exact.mT)
    return gram
