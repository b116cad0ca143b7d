"""When components are pruned and how many may stay (paper Eq. 9).

All steps are optimizer steps, counted after they are done: step 1 is the first update.
"""

from typing import Any, Literal

Schedule = Literal["slow-fast", "fast-slow"]


def pruning_window(total_steps: int, *, prune_start: float, prune_end: float) -> tuple[int, int]:
    """First and last step of the pruning window.

    Nothing is pruned up to the first; at the last the choice is frozen.

    t₀ = ⌊prune_start · total_steps⌋, t₁ = max(t₀ + 1, ⌊prune_end · total_steps⌋)

    Args:
        total_steps: optimizer steps of the whole run, at least 1.
        prune_start: share of the run before the first pruning, in [0, 1).
        prune_end: share of the run at which the choice is frozen, in (prune_start, 1].

    Returns:
        (start, stop) with 0 <= start < stop <= total_steps.

    Raises:
        ValueError: ``total_steps`` is smaller than 1.

    Examples:
        >>> pruning_window(1000, prune_start=0.15, prune_end=0.5)
        (150, 500)
        >>> pruning_window(3, prune_start=0.15, prune_end=0.5)
        (0, 1)
    """
    if total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps} must be at least 1: the number of optimizer steps of the run."
        )
    rounding = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary
    start = min(int(prune_start * total_steps + rounding), total_steps - 1)
    return start, max(start + 1, int(prune_end * total_steps + rounding))


def target_components(mean_rank: float, modules: int) -> int:
    """N_T, components of the whole model at the end: mean rank times modules, rounded, at least 1.

    Examples:
        >>> target_components(0.5, 5), target_components(0.01, 5)
        (3, 1)
    """
    return max(1, int(mean_rank * modules + 0.5))


def budget_at(
    step: int, *, total: int, target: int, start: int, stop: int, schedule: Schedule = "slow-fast"
) -> int:
    """Components that may be alive in the whole model after ``step`` optimizer steps.

    slow-fast:  b(t) = N − ⌊(N − N_T) p³⌋, p = clip((t − t₀) / (t₁ − t₀), 0, 1)            [Eq. 9]
    fast-slow:  b(t) = N_T + ⌈(N − N_T) (1 − p)³⌉                                [AdaLoRA's cubic]

    The printed equation mixes a share with a count; this is the form of the official code. It cuts
    slowly first and fast last, so that scores are ripe when most is cut; the other one leaves the
    survivors more steps at their final ranks. Integers throughout, so the last value is exact.

    Args:
        step: optimizer steps done.
        total: N, components at the start.
        target: N_T, components at the end.
        start: t₀, last step with the full budget.
        stop: t₁ > t₀, first step with the final budget.
        schedule: which of the two.

    Examples:
        >>> [budget_at(t, total=36, target=24, start=30, stop=100) for t in (0, 30, 65, 90, 99, 100, 200)]
        [36, 36, 35, 29, 25, 24, 24]
        >>> plan = {"total": 36, "target": 24, "start": 30, "stop": 100, "schedule": "fast-slow"}
        >>> [budget_at(t, **plan) for t in (0, 30, 40, 65, 99, 100, 200)]
        [36, 36, 32, 26, 25, 24, 24]
    """
    length = stop - start
    done = min(max(step - start, 0), length)
    if schedule == "fast-slow":
        rounded_down = (target - total) * (length - done) ** 3 // length**3  # of a negative share
        return target - rounded_down
    return total - (total - target) * done**3 // length**3


def prune_plan(
    *,
    total: int,
    target: int,
    start: int,
    stop: int,
    interval: int,
    schedule: Schedule = "slow-fast",
) -> list[tuple[int, int]]:
    """Every pruning of a run as (step, components that may be alive from then on).

    Examples:
        >>> prune_plan(total=36, target=24, start=30, stop=60, interval=20)
        [(50, 33), (60, 24)]
    """
    plan: dict[str, Any] = {"total": total, "target": target, "start": start, "stop": stop}
    return [
        (step, budget_at(step, **plan, schedule=schedule))
        for step in range(start + 1, stop + 1)
        if is_prune_step(step, start=start, stop=stop, interval=interval)
    ]


def is_prune_step(step: int, *, start: int, stop: int, interval: int) -> bool:
    """Whether components are pruned after ``step``.

    They are every ``interval`` steps inside the window, and always at its end.

    Examples:
        >>> [t for t in range(40) if is_prune_step(t, start=10, stop=35, interval=10)]
        [20, 30, 35]
    """
    return start < step <= stop and ((step - start) % interval == 0 or step == stop)
