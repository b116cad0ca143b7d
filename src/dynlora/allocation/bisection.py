"""The smallest budget whose loss is close enough to that of the whole adapter."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetCurve:
    """What was tried on the way to a budget.

    Attributes:
        reference: loss with all components.
        limit: the highest loss that was accepted.
        tried: (budget, loss), in the order of the tries.
        budget: the smallest budget tried whose loss is accepted; the whole one if none else is.
    """

    reference: float
    limit: float
    tried: tuple[tuple[int, float], ...]
    budget: int


def smallest_budget(
    loss_at: Callable[[int], float],
    *,
    lowest: int,
    total: int,
    reference: float,
    tolerance: float,
    tries: int = 8,
) -> BudgetCurve:
    """Bisect between ``lowest`` and ``total`` for the smallest budget within the tolerance.

    A budget is accepted if loss_at(budget) ≤ reference · (1 + tolerance), where the reference is the loss
    at ``total``. Steps are taken on a logarithmic scale, since what is asked is "half? a quarter? an
    eighth?". The loss is taken to fall with the budget; where it does not, the result is still a budget
    whose own loss was measured and accepted, in at most ``tries``.

    Examples:
        >>> curve = smallest_budget(lambda b: 1 + 1 / b, lowest=1, total=128, reference=1.0, tolerance=0.05)
        >>> curve.budget
        20
    """
    limit = reference * (1 + tolerance)
    low, high = max(1, lowest) - 1, total  # low is refused or untried, high is accepted
    tried: list[tuple[int, float]] = []
    for _ in range(tries):
        if high - low <= 1:
            break
        middle = min(max(round((max(low, 1) * high) ** 0.5), low + 1), high - 1)
        loss = loss_at(middle)
        tried.append((middle, loss))
        if loss <= limit:
            high = middle
        else:
            low = middle
    return BudgetCurve(reference, limit, tuple(tried), high)
