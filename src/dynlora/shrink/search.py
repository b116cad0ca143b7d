"""The smallest size whose held-out loss stays within a tolerance, for two orders of the triplets."""

from dataclasses import dataclass

from dynlora.shrink.held_out import HeldOut
from dynlora.shrink.spectrum import Cut, Spectra

EVALUATIONS = 8
"""Of one bisection: it ends within 1/256 of the number of components."""


@dataclass(frozen=True)
class Point:
    """One size that was tried.

    Attributes:
        order: "singular values" or "sensitivity".
        components: singular triplets kept in the whole model.
        num_bytes: of the weights' file.
        loss: on the held-out data.
        is_within: whether the loss is within the tolerance.
    """

    order: str
    components: int
    num_bytes: int
    loss: float
    is_within: bool


def search(spectra: Spectra, held_out: HeldOut, *, limit: float) -> tuple[Cut, tuple[Point, ...]]:
    """The smallest adapter found by bisection whose loss is at most ``limit``, and all that was tried."""
    orders = {
        "singular values": spectra.order(),
        "sensitivity": spectra.order(held_out.sensitivity()),
    }
    points, found = [], []
    for name, order in orders.items():
        low, high = 0, len(order)
        for _ in range(EVALUATIONS):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            cut = spectra.first(order, middle)
            loss = held_out.loss(cut)
            kept = sum(int(mask.sum()) for mask in cut)
            points.append(Point(name, kept, spectra.num_bytes(cut), loss, loss <= limit))
            low, high = (low, middle) if loss <= limit else (middle, high)
        found.append(spectra.first(order, high))
    points.sort(key=lambda p: (p.order != "singular values", -p.num_bytes, -p.components))
    return min(found, key=spectra.num_bytes), tuple(points)
