"""The smallest size whose held-out loss stays within a tolerance, for two orders of the triplets."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dynlora.shrink.choice import first, order_by, spectral_order
from dynlora.shrink.held_out import HeldOut
from dynlora.shrink.layout import Cut, Layout

EVALUATIONS = 8
"""Of one bisection: it ends within 1/256 of the number of components."""


@dataclass(frozen=True)
class Point:
    """One size that was tried.

    Attributes:
        order: "singular values" or "sensitivity".
        components: singular triplets kept in the whole model.
        num_bytes: of the weights' file.
        parameters: of the low-rank factors.
        loss: on the held-out data.
        is_within: whether the loss is within the tolerance.
    """

    order: str
    components: int
    num_bytes: int
    parameters: int
    loss: float
    is_within: bool


def search(layout: Layout, held_out: HeldOut, *, limit: float) -> tuple[Cut, list[Point]]:
    """Bisect both orders and take the smaller adapter.

    Args:
        layout: the adapter.
        held_out: measures the loss of a cut.
        limit: the largest loss that is accepted; the whole adapter's is below it.

    Returns:
        The cut, and every size that was tried, by order and falling.
    """
    spectra = layout.spectra
    orders = {
        "singular values": spectral_order(spectra),
        "sensitivity": order_by(held_out.sensitivity(), spectra),
    }
    points: list[Point] = []
    found = []
    for name, order in orders.items():

        def measured(count: int, name: str = name, order: Tensor = order) -> bool:
            cut = first(order, count, spectra)
            loss = held_out.loss(cut)
            kept = sum(int(mask.sum()) for mask in cut)
            points.append(
                Point(
                    name, kept, layout.num_bytes(cut), layout.parameters(cut), loss, loss <= limit
                )
            )
            return loss <= limit

        found.append(first(order, _bisect(len(order), measured), spectra))
    points.sort(key=lambda p: (p.order != "singular values", -p.num_bytes, -p.components))
    return min(found, key=layout.num_bytes), points


def _bisect(count: int, is_within: Callable[[int], bool]) -> int:
    """The smallest number found for which ``is_within`` holds; it is taken to hold for ``count``.

    >>> _bisect(1000, lambda n: n >= 300)
    300
    """
    low, high = 0, count
    for _ in range(EVALUATIONS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if is_within(middle):
            high = middle
        else:
            low = middle
    return high
