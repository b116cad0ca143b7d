"""The smallest budget whose loss is within a limit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetCurve:
    """What was tried on the way to a budget.

    Attributes:
        tried: (budget, loss), in the order of the tries.
        budget: the smallest budget tried whose loss is accepted; the one to start from if none else is.
    """

    tried: tuple[tuple[int, float], ...]
    budget: int


def smallest_budget(
    loss_at: Callable[[int], float],
    *,
    lowest: int,
    accepted: int,
    limit: float,
    first: Iterable[int] = (),
    precision: float = 0.05,
) -> BudgetCurve:
    """Bisect between ``lowest`` and ``accepted`` for the smallest budget whose loss is at most ``limit``.

    ``accepted`` is a budget that is known to be within the limit. The falling budgets ``first`` are tried
    until one is refused; then steps are taken on a logarithmic scale, since what is asked is "half? a
    quarter? an eighth?", until the answer is known within the share ``precision``. The loss is taken to
    fall with the budget; where it does not, the result is still a budget whose own loss was measured and
    accepted.

    Examples:
        >>> curve = smallest_budget(
        ...     lambda b: 1 + 1 / b, lowest=1, accepted=128, limit=1.05, first=(64, 32, 16)
        ... )
        >>> curve.budget, [budget for budget, _ in curve.tried]
        (20, [64, 32, 16, 23, 19, 21, 20])
    """
    low, high = max(1, lowest) - 1, accepted  # low is refused or untried
    tried: list[tuple[int, float]] = []

    def is_accepted(budget: int) -> bool:
        tried.append((budget, loss_at(budget)))
        return tried[-1][1] <= limit

    for budget in first:
        if not low < budget < high:
            continue
        if not is_accepted(budget):
            low = budget
            break
        high = budget
    while high - low > 1 and high > low * (1 + precision):
        middle = min(max(round((max(low, 1) * high) ** 0.5), low + 1), high - 1)
        if is_accepted(middle):
            high = middle
        else:
            low = middle
    return BudgetCurve(tuple(tried), high)
