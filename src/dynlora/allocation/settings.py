"""The knobs of a run, declared once: names, defaults, rules, and the paper's values."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

Importance = Literal["sensitivity", "share", "norm"]
Budget = Literal["parameters", "components"]

PAPER: dict[str, Any] = {
    "importance": "share",
    "budget": "components",
    "revival": True,
    "prune_start": 0.15,
    "prune_end": 0.5,
    "ema_beta": 0.9,
    "dem_weight": 0.1,
}
"""What the paper and its code set; ``dem_weight`` and ``prune_interval`` vary by task there."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the ranks of one adapter are allocated.

    Args:
        target_r: mean rank per adapted module at the end, a number above 0; 2.5 and 0.5 are fine. With
            ``budget="parameters"`` the adapter ends no larger than a LoRA of that rank. ``auto``: nothing
            is pruned until the freeze, and then as much as the held-out loss allows.
        tolerance: with ``auto``, the share of the adapter's gain on held-out rows that may be lost, in
            (0, 1): of the difference between the lowest loss met and the loss without the adapter.
        min_r: components that every module keeps, whatever their scores; an integer of at least 0.
        prune_start: share of the optimizer steps before the first pruning, in [0, 1).
        prune_end: share of the steps at which the ranks are frozen, in (prune_start, 1]; 0.5 if not
            given; with ``auto`` 1, so that what was trained at the full rank is cut after the last step.
        prune_interval: optimizer steps between two prunings, at least 1.
        ema_beta: β of Eq. 8, weight of the past in the smoothed importance, in [0, 1).
        importance: what components are ranked by. ``sensitivity``: abs(⟨b, ∂L/∂b⟩), by how much the
            loss would change without the component, to first order. ``share``: Eq. 7, its share in the
            norm of its module's update. ``norm``: s · ‖b aᵀ‖, the norm of its own update.
        budget: what ``target_r`` counts: ``parameters``, as many as a LoRA of that rank has, or
            ``components``, the paper's count, in which a component of a wide module costs as much as one
            of a narrow module.
        revival: whether a pruned component may train on and come back before the freeze (the paper's
            rule); otherwise every cut is final.
        dem_weight: η of Eq. 10, weight of the DEM penalty until the freeze; 0 is off.
        compact: whether pruned components are removed from modules, gradients and optimizer state at
            the freeze; False keeps all shapes until the end of the run.
        total_steps: optimizer steps of the whole run, where neither Trainer nor ``RankAllocator(...,
            total_steps=...)`` says it.

    Raises:
        ValueError: a rule above is broken.

    Examples:
        >>> Settings(target_r=4).prune_end
        0.5
    """

    target_r: float | Literal["auto"]
    tolerance: float = 0.003
    min_r: int = 0
    prune_start: float = 0.15
    prune_end: float = None  # type: ignore[assignment]  # filled in __post_init__
    prune_interval: int = 10
    ema_beta: float = 0.9
    importance: Importance = "sensitivity"
    budget: Budget = "parameters"
    revival: bool = False
    dem_weight: float = 0.0
    compact: bool = True
    total_steps: int | None = None

    def __post_init__(self) -> None:
        """Fill in the end of the window, and check every rule."""
        if self.prune_end is None:
            object.__setattr__(self, "prune_end", 1.0 if self.is_auto else 0.5)
        check_rules(self._rules())

    @property
    def is_auto(self) -> bool:
        """Whether the budget is found by held-out loss."""
        return self.target_r == "auto"

    def _rules(self) -> Iterator[tuple[bool, str]]:
        yield (
            is_number(self.tolerance) and 0 < self.tolerance < 1,
            f"tolerance={self.tolerance!r} must be a number between 0 and 1: the share of the adapter's "
            "gain on held-out rows that target_r='auto' may give up, such as 0.003.",
        )
        yield (
            self.is_auto or (is_number(self.target_r) and float(self.target_r) > 0),
            f"target_r={self.target_r!r} must be a number above 0, the mean rank per module at the end "
            "(0.5 is one component for every two modules), or 'auto'.",
        )
        to = "" if self.is_auto else f" to target_r={self.target_r}"
        yield (
            is_integer(self.min_r)
            and self.min_r >= 0
            and (self.is_auto or self.min_r <= float(self.target_r)),
            f"min_r={self.min_r!r} must be an integer from 0{to}: the components that every module keeps.",
        )
        start, end = self.prune_start, self.prune_end
        yield (
            is_number(start) and is_number(end) and 0 <= start < end <= 1,
            f"prune_start={start!r}, prune_end={end!r} must satisfy 0 <= prune_start < prune_end <= 1: "
            "shares of the run; the paper uses 0.15 and 0.5.",
        )
        yield (
            is_integer(self.prune_interval) and self.prune_interval >= 1,
            f"prune_interval={self.prune_interval!r} must be an integer of at least 1, in optimizer steps; "
            "the paper uses 10 to 100.",
        )
        for name, kind in (("importance", Importance), ("budget", Budget)):
            value, known = getattr(self, name), get_args(kind)
            yield value in known, f"{name}={value!r} must be one of {', '.join(map(repr, known))}."
        for name in ("revival", "compact"):
            value = getattr(self, name)
            yield isinstance(value, bool), f"{name}={value!r} must be True or False."
        yield (
            is_number(self.ema_beta) and 0 <= self.ema_beta < 1,
            f"ema_beta={self.ema_beta!r} must lie in [0, 1); the paper uses 0.9.",
        )
        yield (
            is_number(self.dem_weight) and self.dem_weight >= 0,
            f"dem_weight={self.dem_weight!r} must be 0 or more: a negative weight would reward uneven "
            "components. 0 switches DEM off; the paper uses 0.1 to 0.5.",
        )
        yield (
            self.total_steps is None or (is_integer(self.total_steps) and self.total_steps > 0),
            f"total_steps={self.total_steps!r} must be an integer of at least 1, in optimizer steps, or "
            "None to take it from the Trainer or RankAllocator.",
        )


def settings_from(given: dict[str, Any], *, preset: str | None = None, where: str) -> Settings:
    """Settings from keyword arguments by field name, with a preset below them.

    Raises:
        TypeError: ``where``, which the user called, has no such argument; the nearest one is proposed.
        ValueError: ``target_r`` is missing, the preset is unknown, or a rule of Settings is broken.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"{where} has no argument {name!r}.{hint} The settings are {', '.join(known)}."
            )
    if preset not in {None, "paper"}:
        raise ValueError(f"preset={preset!r} must be 'paper' or None.")
    if "target_r" not in given:
        raise ValueError(
            "target_r is missing: DynLoraCallback and RankAllocator need the mean rank per adapted module "
            "at the end, such as target_r=8, or target_r='auto'."
        )
    return Settings(**{**(PAPER if preset == "paper" else {}), **given})


def check_rules(rules: Iterable[tuple[bool, str]]) -> None:
    """Raise ValueError with the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
