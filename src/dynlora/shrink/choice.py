"""Which singular triplets stay: by energy, by kohya's rules, by rank, by size."""

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from dynlora.shrink.spectrum import Cut, Spectra

_ROUNDING = 1e-12
"""Shares are sums of float64 numbers: one that is this close to the wish has reached it."""


def by_energy(spectra: Spectra, share: float, *, per_module: bool = False) -> Cut:
    """The fewest triplets of an order that hold ``share`` of Σσ², over the model or in each module."""
    _check_share("energy", share)
    if per_module:
        return _by_module(spectra, lambda energy: _reaching(energy, share))
    order = spectra.order()
    energy = torch.cat([module.energy for module in spectra.modules])
    return spectra.first(order, _reaching(energy[order], share))


def by_method(spectra: Spectra, method: str, value: float) -> Cut:
    """The rules of kohya's resize, in each module by itself.

    Args:
        spectra: the adapter.
        method: ``sv_ratio`` keeps σ ≥ σ_max / value, ``sv_fro`` the share ``value`` of the Frobenius
            norm √Σσ², ``sv_cumulative`` the share ``value`` of Σσ.
        value: of the rule.
    """
    if method == "sv_ratio":
        if not value >= 1:
            raise ValueError(
                f"value={value} of method='sv_ratio' must be 1 or more: singular values stay that are at "
                "least the largest divided by it."
            )
        limit = value * (1 + _ROUNDING)
        return _by_module(spectra, lambda e: int((e.sqrt() * limit >= e.sqrt().max()).sum()))
    if method not in {"sv_fro", "sv_cumulative"}:
        raise ValueError(f"method={method!r} is none of sv_ratio, sv_fro, sv_cumulative.")
    _check_share("value", value)
    if method == "sv_fro":
        return _by_module(spectra, lambda energy: _reaching(energy, value**2))
    return _by_module(spectra, lambda energy: _reaching(energy.sqrt(), value))


def by_budget(spectra: Spectra, order: Tensor, name: str, value: float) -> Cut:
    """The largest part of an order within a budget, ``mean_rank`` or ``size_mb`` (10⁶ bytes)."""
    measures = {
        "mean_rank": (spectra.parameters, spectra.cost),
        "size_mb": (spectra.num_bytes, 1e6),
    }
    measure, unit = measures[name]
    smallest = measure(spectra.first(order, 1)) / unit
    if not value >= smallest:
        raise ValueError(
            f"{name}={value} is too small: of the smallest adapter, with one component and what was "
            f"trained beside the LoRA, it is {smallest:.3g}. Take at least that."
        )
    counts = range(1, len(order) + 1)
    held = bisect_right(counts, value * unit, key=lambda n: measure(spectra.first(order, n)))
    return spectra.first(order, held)


def _by_module(spectra: Spectra, count: Callable[[Tensor], int]) -> Cut:
    """``count`` says how many of a module's triplets stay, given their energies; none of a zero update."""
    cut = []
    for module in spectra.modules:
        stay = count(module.energy) if bool(module.energy.any()) else 0
        cut.append(torch.arange(module.count) < max(stay, module.update.min_rank))
    return cut


def _reaching(values: Tensor, share: float) -> int:
    """How many of ``values``, in their order, sum up to ``share`` of all."""
    sums = values.cumsum(0)
    wanted = share * float(sums[-1]) * (1 - _ROUNDING)
    return int((sums < wanted).sum()) + 1


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}={share} must be above 0 and at most 1: it is a share, as 0.95.")
