"""``target_r="auto"``: the smallest adapter whose held-out loss is close to that of the whole one."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

    Two orders are tried, and the one that needs less wins: sensitivity in the basis that was trained, and
    the energy (squared norm) of components that are first made orthogonal to each other.

    Args:
        modules: of the adapter, none of them dropped.
        costs: cost of one component of each module.
        floors: components that each module keeps.
        evaluate: the held-out loss.
        tolerance: relative rise of the loss that is accepted.
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
        self.modules = modules
        self.costs = costs
        self.floors = floors
        self.evaluate = evaluate
        self.tolerance = tolerance
        self.sizes = [m.rank for m in modules]

    @torch.no_grad()
    def search(self) -> Choice:
        """Find the smallest budget; the model is unchanged afterwards.

        Raises:
            NotFiniteError: the held-out loss of the whole adapter is NaN or infinite.
            ValueError: it is not positive.
        """
        reference = self._loss()
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
        found = [self._in_order("sensitivity", _joined([m.ema for m in self.modules]), reference)]
        if not any(m.is_gated for m in self.modules):
            with self._restored():
                for module in self.modules:
                    rotate_(module)
                energy = _joined(norms(self.modules, "norm")).square()
                found.append(self._in_order("energy", energy, reference))
        return min(found, key=lambda choice: choice.curve.budget)

    def _in_order(self, order: str, scores: Tensor, reference: float) -> Choice:
        prices = torch.tensor(
            [c for c, s in zip(self.costs, self.sizes, strict=True) for _ in range(s)]
        )
        total = int(prices.sum())
        seen = {total: reference}

        def loss_at(budget: int) -> float:
            if budget not in seen:
                keep = allocation.select_components(
                    scores, prices, budget, floors=self.floors, sizes=self.sizes
                )
                seen[budget] = self._loss(keep)
            return seen[budget]

        needed = sum(f * c for f, c in zip(self.floors, self.costs, strict=True))
        curve = smallest_budget(
            loss_at,
            lowest=max(needed, min(self.costs)),
            total=total,
            reference=reference,
            tolerance=self.tolerance,
        )
        return Choice(order, curve, tuple(self._by_rank(loss_at, total, needed)), scores)

    def _by_rank(
        self, loss_at: Callable[[int], float], total: int, needed: int
    ) -> Iterator[tuple[int, int, float]]:
        rank = 1
        while (cost := rank * sum(self.costs)) < total:
            if cost >= needed:
                yield rank, cost, loss_at(cost)
            rank *= 2

    def _loss(self, keep: Tensor | None = None) -> float:
        """The held-out loss with the components ``keep`` only, the same on every process."""
        if keep is None:
            return mean_over_processes(self.evaluate(), self.modules[0].ema.device)
        held = [m.live.clone() for m in self.modules]
        with self._restored():
            for module, live in zip(self.modules, keep.split(self.sizes), strict=True):
                module.live.copy_(live)
            Masks(self.modules).apply_()
            loss = mean_over_processes(self.evaluate(), self.modules[0].ema.device)
        for module, live in zip(self.modules, held, strict=True):
            module.live.copy_(live)
        return loss if math.isfinite(loss) else math.inf

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Give the adapter its values back afterwards, to the bit."""
        parameters = [f.parameter for m in self.modules for f in m.factors]
        values = [p.detach().clone() for p in parameters]
        scores = [m.ema.clone() for m in self.modules]
        try:
            yield
        finally:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)
            for module, score in zip(self.modules, scores, strict=True):
                module.ema.copy_(score)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.float().cpu() for t in tensors])
