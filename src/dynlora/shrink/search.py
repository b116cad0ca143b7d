"""The smallest size that keeps the gain in held-out loss within a tolerance, in two orders of triplets."""

from dataclasses import dataclass

from torch import Tensor

from dynlora.shrink.held_out import HeldOut
from dynlora.shrink.spectrum import Cut, Spectra

EVALUATIONS = 8
"""Of one bisection: it ends within 1/256 of the number of components."""


@dataclass(frozen=True)
class Point:
    """One size that was tried.

    Attributes:
        order: "singular values" or "curvature".
        components: triplets kept in the whole model.
        num_bytes: of the weights' file.
        loss: on the held-out data.
        gain_lost: share of the adapter's gain in loss; below 0 where the loss is below the whole adapter's.
        is_within: whether the share is within the tolerance.
    """

    order: str
    components: int
    num_bytes: int
    loss: float
    gain_lost: float
    is_within: bool


def gain_lost(loss: float, whole: float, without: float) -> float:
    """(loss − whole) / (without − whole): the share of the adapter's gain in loss that is lost.

    >>> gain_lost(1.75, whole=1.5, without=2.5), gain_lost(1.25, whole=1.5, without=2.5)
    (0.25, -0.25)
    """
    return (loss - whole) / (without - whole)


def measured_orders(spectra: Spectra, held_out: HeldOut) -> dict[str, tuple[Spectra, Tensor]]:
    """The adapter by singular triplets and by those of curvature, and their order, by its name."""
    orders = {"singular values": (spectra, spectra.order())}
    if (found := held_out.curved()) is not None:
        curved, worth = found
        orders["curvature"] = curved, curved.order(worth)
    return orders


def is_nearer_than_0(basis: Spectra, cut: Cut) -> bool:
    """Whether a cut is nearer to ΔW than no adapter is; one by curvature need not be, far from the data."""
    return basis.energy(cut) > 0


def search(
    spectra: Spectra, held_out: HeldOut, whole: float, without: float, *, tolerance: float
) -> tuple[Spectra, Cut, tuple[Point, ...]]:
    """The smallest adapter found by bisection that loses ``tolerance`` of the gain at most, and all tried.

    ``whole`` and ``without`` are the losses with all triplets and with none, the second the higher one.

    Returns:
        The adapter by the triplets of the order that won, the cut of these, and all sizes tried.
    """
    points, found = [], []
    for name, (basis, order) in measured_orders(spectra, held_out).items():
        low, high = 0, len(order)
        for _ in range(EVALUATIONS):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            cut = basis.first(order, middle)
            loss = held_out.loss(basis, cut)
            kept = sum(int(mask.sum()) for mask in cut)
            lost = gain_lost(loss, whole, without)
            is_within = lost <= tolerance
            points.append(Point(name, kept, basis.num_bytes(cut), loss, lost, is_within))
            low, high = (low, middle) if is_within else (middle, high)
        cut = basis.first(order, high)
        if name == "singular values" or is_nearer_than_0(basis, cut):
            found.append((basis, cut))
    points.sort(key=lambda p: (p.order != "singular values", -p.num_bytes, -p.components))
    basis, cut = min(found, key=lambda one: one[0].num_bytes(one[1]))
    return basis, cut, tuple(points)
