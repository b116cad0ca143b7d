"""``target_r="auto"``: the smallest adapter that keeps nearly all that training gained on held-out rows."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlora import allocation
from dynlora.allocation.bisection import BudgetCurve, smallest_budget
from dynlora.allocator.masks import Masks
from dynlora.allocator.processes import (
    any_process,
    mean_over_processes,
    sum_over_processes_,
)
from dynlora.errors import NotFiniteError
from dynlora.lora.components import LoraComponents
from dynlora.lora.curvature import Curvature
from dynlora.lora.triplets import to_singular_

Evaluate = Callable[[], float]
"""The held-out loss of the model as it is now, positive; smaller is better. It must not train anything.

It may have a method ``backward()``, an iterator over held-out batches that leaves the gradients of one in
the parameters at each step, and the parameters' own gradients in their place at its end."""

Copies = Sequence[Mapping[str, LoraComponents]]
"""The modules of copies of the model, by name."""

Turn = Callable[[Optimizer | None, Copies], Tensor]
"""Puts components, the optimizer's state and copies into the basis of an order, in place; the scores."""


@dataclass(frozen=True)
class Limits:
    """What is accepted: reference + tolerance · (without − reference), all of them held-out losses.

    Attributes:
        without: with no component: of the base, with what is trained beside the adapter.
        whole: with all components.
        reference: the lowest of the whole adapter and of the ranks tried, in any order.
        limit: the highest that is accepted.
    """

    without: float
    whole: float
    reference: float
    limit: float


@dataclass(frozen=True)
class Choice:
    """What was found.

    Attributes:
        order: what components were ranked by: ``energy`` of singular triplets, ``curvature``, or
            ``scores`` as trained.
        curve: budgets tried in this order, and the loss of each.
        limits: what was accepted, and why.
        by_rank: loss at the size of a LoRA of rank 1, 2, 4, … in this order, as (rank, cost, loss).
        turn_: into the basis of this order; the search itself leaves the components in that of training.
    """

    order: str
    curve: BudgetCurve
    limits: Limits
    by_rank: tuple[tuple[int, int, float], ...]
    turn_: Turn

    def record(self) -> dict[str, Any]:
        """For the history; plain numbers."""
        return {
            "order": self.order,
            **asdict(self.limits),
            "tried": [list(point) for point in self.curve.tried],
            "by_rank": [list(point) for point in self.by_rank],
            "budget": self.curve.budget,
        }


def whole_loss(evaluate: Evaluate, device: torch.device) -> float:
    """The held-out loss of the whole adapter, the same on every process.

    Raises:
        NotFiniteError: it is NaN or infinite.
        ValueError: it is 0 or negative.
    """
    whole = mean_over_processes(evaluate(), device)
    if not math.isfinite(whole):
        raise NotFiniteError(
            f"the held-out loss is {whole} with all components, so no smaller adapter can be "
            "compared with it. Look at the held-out data, and go on from the last checkpoint."
        )
    if whole <= 0:
        raise ValueError(
            f"evaluate returned {whole}: target_r='auto' compares losses, positive and smaller for "
            "a better model. Return a loss, or set target_r to a number."
        )
    return whole


class _Order:
    """Components in one order, and the loss of each budget that was tried in it."""

    def __init__(self, name: str, turn_: Turn, total: int, whole: float) -> None:
        self.name, self.turn_, self.seen = name, turn_, {total: whole}
        self.scores = torch.empty(0)  # known once the components are in the order's basis

    @property
    def lowest(self) -> float:
        """The lowest loss of all budgets tried."""
        return min(self.seen.values())

    @property
    def best(self) -> int:
        """The largest budget of that loss."""
        return max(budget for budget, loss in self.seen.items() if loss == self.lowest)


class BudgetSearch:
    """Puts all components of a model into one order and bisects it against the held-out loss.

    Two orders are tried: the energy (σ²) of the singular triplets of each module, and, where ``evaluate``
    gives gradients, the curvature of the held-out loss, in the basis of ``dynlora.lora.curvature``; without
    gradients, or with a score of the user's own, the scores in the basis that was trained. All are measured
    at the sizes of LoRAs of rank 1, 2, 4, …; the lowest loss of these and of the whole adapter, which may
    overfit, is what a smaller one is compared with. From there an order is walked down to the smallest size
    within the tolerance, the next only where it is accepted at the size that the one before needs; it wins
    if it needs less.

    ``costs`` are those of one component of each module, ``floors`` the components that each keeps;
    ``tolerance`` is the share of the adapter's gain that may be lost: of the difference between the lowest
    loss and that without any component. Less than a LoRA of rank 1 has is not tried: it would save next to
    nothing, and a loss that hardly fell so far excuses it. No module is dropped.
    """

    def __init__(
        self,
        modules: Sequence[LoraComponents],
        costs: Sequence[int],
        floors: Sequence[int],
        evaluate: Evaluate,
        *,
        tolerance: float,
        has_own_score: bool = False,
    ) -> None:
        self.modules, self.floors = modules, floors
        self.evaluate, self.tolerance = evaluate, tolerance
        self.has_own_score = has_own_score
        self.sizes = [m.rank for m in modules]
        self.prices = torch.tensor(costs).repeat_interleave(torch.tensor(self.sizes))
        self.total = int(self.prices.sum())
        floor = sum(f * c for f, c in zip(floors, costs, strict=True))
        self.lowest = min(max(floor, sum(costs)), self.total)
        doubled = takewhile(lambda r: r * sum(costs) < self.total, (2**i for i in count()))
        self.by_rank = [(r, r * sum(costs)) for r in doubled if r * sum(costs) >= self.lowest]

    @torch.no_grad()
    def search(self) -> Choice:
        """Find the smallest budget; the model is unchanged afterwards."""
        whole = whole_loss(self.evaluate, self.modules[0].ema.device)
        orders = [_Order(name, turn_, self.total, whole) for name, turn_ in self._turns().items()]
        for order in orders:
            with self._turned(order):
                for _, cost in self.by_rank:
                    self._loss_at(cost, order)
        limits = self._limits(*orders)
        found: Choice | None = None
        for order in orders:
            with self._turned(order):
                if found is None:
                    found = self._smallest(order, limits)
                elif self._loss_at(found.curve.budget, order) <= limits.limit:
                    other = self._smallest(order, limits)
                    found = min(found, other, key=lambda choice: choice.curve.budget)
        assert found is not None  # noqa: S101  # there is an order
        if found.curve.budget == self.total:  # nothing goes, so nothing has to be turned
            return replace(found, turn_=partial(_as_trained, self.modules))
        return found

    def _turns(self) -> dict[str, Turn]:
        """By name of the order; gates stand in front of components as trained, so those are not turned."""
        trained: dict[str, Turn] = {"scores": partial(_as_trained, self.modules)}
        if any(m.is_gated for m in self.modules):
            return trained
        turns: dict[str, Turn] = {"energy": partial(_to_energy_, self.modules)}
        curvature = self._curvature()
        if curvature is not None:
            turns["curvature"] = curvature.turn_
        has_scores = any(bool(m.ema.any()) for m in self.modules)
        if has_scores and (self.has_own_score or curvature is None):
            turns |= trained
        return turns

    def _curvature(self) -> Curvature | None:
        """Of the held-out loss, over all processes' batches; None where gradients cannot be had."""
        backward = getattr(self.evaluate, "backward", None)
        if backward is None:
            return None
        curvature = Curvature(self.modules)
        why = "it fails on another process"
        has_failed = False
        try:
            with torch.enable_grad():
                for _ in backward():
                    curvature.add()
        except RuntimeError as error:  # of memory too; what was trained must not be lost by it
            has_failed, why = True, str(error)
        device = self.modules[0].ema.device
        if any_process(has_failed, device):
            warnings.warn(
                "target_r='auto': components are not ordered by curvature, since a backward pass over a "
                f"batch of the held-out rows fails: {why}",
                stacklevel=2,
            )
            return None
        if not any_process(curvature.batches > 0, device):
            return None
        for pair in curvature.sums:
            sum_over_processes_(pair)
        return curvature

    def _limits(self, *orders: _Order) -> Limits:
        """The highest loss that is accepted, and what it is computed from."""
        without = self._loss(torch.zeros(len(self.prices), dtype=torch.bool))
        reference = min(order.lowest for order in orders)
        gain = without - reference
        if not 0 < gain < math.inf:
            gain = 0.0
            warnings.warn(
                f"target_r='auto': the held-out loss is {without:.4g} without the adapter and "
                f"{reference:.4g} at the best size tried, so training has gained nothing on the held-out "
                "rows, and nothing of it can be given up. Look at these rows and at the learning rate.",
                stacklevel=2,
            )
        whole = orders[0].seen[self.total]
        return Limits(without, whole, reference, limit=reference + self.tolerance * gain)

    def _smallest(self, order: _Order, limits: Limits) -> Choice:
        """Walk down from the largest of the best sizes, or stay whole if none of this order is accepted."""
        curve = smallest_budget(
            lambda budget: self._loss_at(budget, order),
            lowest=self.lowest,
            accepted=order.best if order.lowest <= limits.limit else self.total,
            limit=limits.limit,
            first=[cost for _, cost in reversed(self.by_rank)],
        )
        by_rank = tuple((r, cost, order.seen[cost]) for r, cost in self.by_rank)
        return Choice(order.name, curve, limits, by_rank, order.turn_)

    def _loss_at(self, budget: int, order: _Order) -> float:
        """The held-out loss with what fits into the budget; each is measured once."""
        if budget not in order.seen:
            keep = allocation.select_components(
                order.scores, self.prices, budget, floors=self.floors, sizes=self.sizes
            )
            order.seen[budget] = self._loss(keep)
        return order.seen[budget]

    def _evaluate(self) -> float:
        """The held-out loss of the model as it is, the same on every process."""
        return mean_over_processes(self.evaluate(), self.modules[0].ema.device)

    def _loss(self, keep: Tensor) -> float:
        """The held-out loss with the components ``keep`` only."""
        with self._restored():
            for module, live in zip(self.modules, keep.split(self.sizes), strict=True):
                module.live.copy_(live)
            Masks(self.modules).apply_()
            loss = self._evaluate()
        return loss if math.isfinite(loss) else math.inf

    @contextmanager
    def _turned(self, order: _Order) -> Iterator[None]:
        """Components in the basis of an order, for a while."""
        with self._restored():
            order.scores = order.turn_(None, ())
            yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Give the adapter, its gradients, scores and masks their values back afterwards, to the bit."""
        parameters = [f.parameter for m in self.modules for f in m.factors]
        gradients = [p.grad for p in parameters]
        tensors = [p.data for p in parameters]
        tensors += [t for m in self.modules for t in (m.ema, m.live)]
        values = [t.clone() for t in tensors]
        for parameter in parameters:
            parameter.grad = None  # nothing to turn to and fro
        try:
            yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient


def _as_trained(
    modules: Sequence[LoraComponents], _optimizer: Optimizer | None, _copies: Copies
) -> Tensor:
    """The smoothed scores; nothing is turned."""
    return _joined([m.ema for m in modules])


def _to_energy_(
    modules: Sequence[LoraComponents], optimizer: Optimizer | None, copies: Copies
) -> Tensor:
    """Make the components of each module singular triplets, in place; (s·σ)² of each."""
    return _joined([to_singular_(m, optimizer, [copy[m.name] for copy in copies]) for m in modules])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.float().cpu() for t in tensors])
