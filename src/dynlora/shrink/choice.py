"""Which singular triplets stay: by energy, by kohya's rules, by rank, by size."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dynlora.shrink.layout import Cut, Layout
from dynlora.shrink.spectrum import Spectrum

Method = Literal["sv_ratio", "sv_fro", "sv_cumulative"]

_ROUNDING = 1e-12
"""Shares are sums of float64 numbers: one that is this close to the wish has reached it."""


def spectral_order(spectra: Sequence[Spectrum]) -> Tensor:
    """All triplets of the model, those of most energy per parameter first.

    A wide module pays for its width: of two triplets with equal energy the cheaper one comes first.

    Returns:
        Places of the triplets as if all modules' triplets stood in one row, (triplets of the model,).
    """
    return order_by([s.energy for s in spectra], spectra)


def order_by(worth: Sequence[Tensor], spectra: Sequence[Spectrum]) -> Tensor:
    """All triplets by worth per parameter, falling; those that must stay come before all others.

    Args:
        worth: of each module's triplets, (triplets,), not negative.
        spectra: the modules.
    """
    rows = []
    for values, spectrum in zip(worth, spectra, strict=True):
        row = values.double() / spectrum.update.cost
        if spectrum.update.min_rank:
            row[int(row.argmax())] = torch.inf
        rows.append(row)
    return torch.cat(rows).argsort(descending=True, stable=True)


def first(order: Tensor, count: int, spectra: Sequence[Spectrum]) -> Cut:
    """The cut that keeps the first ``count`` triplets of an order, and those that must stay."""
    forced = sum(s.update.min_rank for s in spectra)
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[: max(count, forced, 1)]] = True
    return mask.split([s.sigma.shape[1] for s in spectra])


def everything(spectra: Sequence[Spectrum]) -> Cut:
    """The cut that keeps all."""
    return [torch.ones(s.sigma.shape[1], dtype=torch.bool) for s in spectra]


def same_rank(rank: int, spectra: Sequence[Spectrum]) -> Cut:
    """The cut that keeps the ``rank`` largest singular values of every module."""
    return [torch.arange(s.sigma.shape[1]) < rank for s in spectra]


def by_energy(share: float, spectra: Sequence[Spectrum], *, per_module: bool = False) -> Cut:
    """The fewest triplets of an order that hold ``share`` of Σσ², over the model or in each module.

    Raises:
        ValueError: ``share`` is not above 0 and at most 1.
    """
    _check_share("energy", share)
    if per_module:
        return _by_module(spectra, lambda energy: _reaching(energy, share))
    order = spectral_order(spectra)
    energy = torch.cat([s.energy for s in spectra])
    return first(order, _reaching(energy[order], share), spectra)


def by_method(method: str, value: float, spectra: Sequence[Spectrum]) -> Cut:
    """The rules of kohya's resize, in each module by itself.

    Args:
        method: ``sv_ratio`` keeps σ ≥ σ_max / value, ``sv_fro`` the share ``value`` of the Frobenius
            norm √Σσ², ``sv_cumulative`` the share ``value`` of Σσ.
        value: of the rule.
        spectra: the modules.

    Raises:
        ValueError: there is no such rule, or its value is out of range.
    """
    if method == "sv_ratio":
        if not value >= 1:
            raise ValueError(
                f"value={value} of method='sv_ratio' must be 1 or more: singular values stay that are at "
                "least the largest divided by it."
            )
        limit = value * (1 + _ROUNDING)
        return _by_module(spectra, lambda e: int((e.sqrt() * limit >= e.sqrt().max()).sum()))
    if method == "sv_fro":
        _check_share("value", value)
        return _by_module(spectra, lambda energy: _reaching(energy, value**2))
    if method == "sv_cumulative":
        _check_share("value", value)
        return _by_module(spectra, lambda energy: _reaching(energy.sqrt(), value))
    raise ValueError(f"method={method!r} is none of sv_ratio, sv_fro, sv_cumulative.")


def by_mean_rank(rank: float, layout: Layout) -> Cut:
    """The largest part of the spectral order that has no more parameters than ``rank`` everywhere.

    Raises:
        ValueError: even the smallest adapter has more.
    """
    budget = rank * sum(u.cost for u in layout.adapter.updates)
    smallest = layout.parameters(first(spectral_order(layout.spectra), 0, layout.spectra))
    if not budget >= smallest:
        least = smallest / sum(u.cost for u in layout.adapter.updates)
        raise ValueError(
            f"mean_rank={rank} is too small: the smallest adapter, with one component, has the parameters "
            f"of a mean rank of {least:.3g}. Take at least that."
        )
    return _largest(layout, lambda cut: layout.parameters(cut) <= budget)


def by_size(megabytes: float, layout: Layout) -> Cut:
    """The largest part of the spectral order whose file is not larger than ``megabytes`` (10⁶ bytes).

    Raises:
        ValueError: even the smallest adapter is larger.
    """
    smallest = layout.num_bytes(first(spectral_order(layout.spectra), 0, layout.spectra)) / 1e6
    if not megabytes >= smallest:
        raise ValueError(
            f"size_mb={megabytes} is too small: with one component, and what was trained beside the LoRA, "
            f"the file has {smallest:.3g} MB. Take at least that."
        )
    return _largest(layout, lambda cut: layout.num_bytes(cut) <= megabytes * 1e6)


def _largest(layout: Layout, fits: Callable[[Cut], bool]) -> Cut:
    """The longest beginning of the spectral order that fits; it grows with its length."""
    order = spectral_order(layout.spectra)
    low, high = 1, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(first(order, middle, layout.spectra)):
            low = middle
        else:
            high = middle - 1
    return first(order, low, layout.spectra)


def _by_module(spectra: Sequence[Spectrum], count: Callable[[Tensor], int]) -> Cut:
    """``count`` says how many of a module's triplets stay, given their energies; none of a zero update."""
    cut = []
    for spectrum in spectra:
        energy = spectrum.energy
        stay = count(energy) if bool(energy.any()) else 0
        cut.append(torch.arange(len(energy)) < max(stay, spectrum.update.min_rank))
    return cut


def _reaching(values: Tensor, share: float) -> int:
    """How many of ``values``, in their order, sum up to ``share`` of all."""
    sums = values.cumsum(0)
    wanted = share * float(sums[-1]) * (1 - _ROUNDING)
    return int((sums < wanted).sum()) + 1


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}={share} must be above 0 and at most 1: it is a share, as 0.95.")
