"""``target_r="auto"``: the smallest adapter whose held-out loss is close to that of the whole one."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from dynlora import allocation
from dynlora.allocation.bisection import BudgetCurve, smallest_budget
from dynlora.allocator.masks import Masks
from dynlora.allocator.processes import mean_over_processes
from dynlora.allocator.scores import norms
from dynlora.errors import NotFiniteError
from dynlora.lora.components import LoraComponents
from dynlora.lora.rotation import rotate_

Evaluate = Callable[[], float]
"""The held-out loss of the model as it is now, positive; smaller is better. It must not train anything."""


@dataclass(frozen=True)
class Choice:
    """What was found.

    Attributes:
        order: what components were ranked by: ``sensitivity`` as trained, or ``energy`` after a rotation.
        curve: budgets tried in this order, and the loss of each.
        by_rank: loss at the size of a LoRA of rank 1, 2, 4, … in this order, as (rank, cost, loss).
        scores: of all components in this order, (components,).
    """

    order: str
    curve: BudgetCurve
    by_rank: tuple[tuple[int, int, float], ...]
    scores: Tensor

    def record(self) -> dict[str, Any]:
        """For the history; plain numbers."""
        return {
            "order": self.order,
            "reference": self.curve.reference,
            "limit": self.curve.limit,
            "tried": [list(point) for point in self.curve.tried],
            "by_rank": [list(point) for point in self.by_rank],
            "budget": self.curve.budget,
        }


class BudgetSearch:
    """Puts all components of a model into one order and bisects it against the held-out loss.

    Two orders are tried: sensitivity in the basis that was trained, and the energy (squared norm) of
    components that are first made orthogonal to each other. The second is searched only where it is
    accepted at the size that the first needs, and wins if it needs less.

    ``costs`` are those of one component of each module, ``floors`` the components that each keeps;
    ``tolerance`` is the relative rise of the loss that is accepted. No module is dropped.
    """

    def __init__(
        self,
        modules: Sequence[LoraComponents],
        costs: Sequence[int],
        floors: Sequence[int],
        evaluate: Evaluate,
        *,
        tolerance: float,
    ) -> None:
        self.modules, self.floors = modules, floors
        self.evaluate, self.tolerance = evaluate, tolerance
        self.sizes = [m.rank for m in modules]
        self.prices = torch.tensor(costs).repeat_interleave(torch.tensor(self.sizes))
        self.total = int(self.prices.sum())
        self.lowest = max(sum(f * c for f, c in zip(floors, costs, strict=True)), min(costs))
        doubled = takewhile(lambda r: r * sum(costs) < self.total, (2**i for i in count()))
        self.by_rank = [(r, r * sum(costs)) for r in doubled if r * sum(costs) >= self.lowest]

    @torch.no_grad()
    def search(self) -> Choice:
        """Find the smallest budget; the model is unchanged afterwards."""
        reference = self._evaluate()
        if not math.isfinite(reference):
            raise NotFiniteError(
                f"the held-out loss is {reference} with all components, so no smaller adapter can be "
                "compared with it. Look at the held-out data, and go on from the last checkpoint."
            )
        if reference <= 0:
            raise ValueError(
                f"evaluate returned {reference}: target_r='auto' compares losses, positive and smaller for "
                "a better model. Return a loss, or set target_r to a number."
            )
        sensitivity = _joined([m.ema for m in self.modules])
        found = self._in_order("sensitivity", sensitivity, reference)
        if any(m.is_gated for m in self.modules):
            return found
        with self._restored():
            for module in self.modules:
                rotate_(module)
            energy = _joined(norms(self.modules, "norm")).square()
            loss = self._loss_at(found.curve.budget, energy)
            if loss > found.curve.limit:
                return found
            other = self._in_order("energy", energy, reference, {found.curve.budget: loss})
        return min(found, other, key=lambda choice: choice.curve.budget)

    def _in_order(
        self, order: str, scores: Tensor, reference: float, known: Mapping[int, float] | None = None
    ) -> Choice:
        seen = {self.total: reference, **(known or {})}

        def loss_at(budget: int) -> float:
            if budget not in seen:
                seen[budget] = self._loss_at(budget, scores)
            return seen[budget]

        curve = smallest_budget(
            loss_at,
            lowest=self.lowest,
            total=self.total,
            reference=reference,
            tolerance=self.tolerance,
            first=[cost for _, cost in reversed(self.by_rank)],
        )
        by_rank = tuple((r, cost, loss_at(cost)) for r, cost in self.by_rank)
        return Choice(order, curve, by_rank, scores)

    def _loss_at(self, budget: int, scores: Tensor) -> float:
        """The held-out loss with what fits into the budget, in the order of ``scores``."""
        return self._loss(
            allocation.select_components(
                scores, self.prices, budget, floors=self.floors, sizes=self.sizes
            )
        )

    def _evaluate(self) -> float:
        """The held-out loss of the model as it is, the same on every process."""
        return mean_over_processes(self.evaluate(), self.modules[0].ema.device)

    def _loss(self, keep: Tensor) -> float:
        """The held-out loss with the components ``keep`` only."""
        held = [m.live.clone() for m in self.modules]
        with self._restored():
            for module, live in zip(self.modules, keep.split(self.sizes), strict=True):
                module.live.copy_(live)
            Masks(self.modules).apply_()
            loss = self._evaluate()
        for module, live in zip(self.modules, held, strict=True):
            module.live.copy_(live)
        return loss if math.isfinite(loss) else math.inf

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Give the adapter and its scores their values back afterwards, to the bit."""
        tensors = [f.parameter.data for m in self.modules for f in m.factors]
        tensors += [m.ema for m in self.modules]
        values = [t.clone() for t in tensors]
        try:
            yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.float().cpu() for t in tensors])
