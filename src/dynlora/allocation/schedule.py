"""When components are pruned and how many may stay (paper Eq. 9).

All steps are optimizer steps, counted after they are done: step 1 is the first update.
"""


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


def target_cost(mean_rank: float, component_costs: list[int], *, in_components: bool) -> int:
    """N_T, what the whole model may cost at the end.

    In components, costs of 1: mean rank times modules, rounded, at least 1. In parameters: those of a
    LoRA of that rank on the same modules, rounded down, so that the adapter never ends larger; at least
    one component of the cheapest module.

    Args:
        mean_rank: ``target_r``.
        component_costs: cost of one component of each module, in module order.
        in_components: whether components are counted.

    Examples:
        >>> target_cost(0.5, [1] * 5, in_components=True), target_cost(0.01, [1] * 5, in_components=True)
        (3, 1)
        >>> target_cost(2.5, [10, 30], in_components=False)
        100
    """
    rounding = 0.5 if in_components else 1e-9  # 0.29 * 100 is 28.999999999999996 in binary
    return max(min(component_costs), int(mean_rank * sum(component_costs) + rounding))


def budget_at(step: int, *, total: int, target: int, start: int, stop: int) -> int:
    """What the whole model may hold after ``step`` optimizer steps, in the unit of ``total``.

    b(t) = N − ⌊(N − N_T) p³⌋, p = clip((t − t₀) / (t₁ − t₀), 0, 1)                         [Eq. 9]

    The printed equation mixes a share with a count; this is the form of the official code. It cuts
    slowly first and fast last, so that scores are ripe when most is cut. Integers throughout, so the
    last value is exact.

    Args:
        step: optimizer steps done.
        total: N, the sum of all costs at the start.
        target: N_T, the sum of costs at the end.
        start: t₀, last step with the full budget.
        stop: t₁ > t₀, first step with the final budget.

    Examples:
        >>> [budget_at(t, total=36, target=24, start=30, stop=100) for t in (0, 30, 65, 90, 99, 100, 200)]
        [36, 36, 35, 29, 25, 24, 24]
    """
    length = stop - start
    done = min(max(step - start, 0), length)
    return total - (total - target) * done**3 // length**3


def prune_plan(
    *, total: int, target: int, start: int, stop: int, interval: int
) -> list[tuple[int, int]]:
    """Every pruning of a run as (step, budget from then on).

    Examples:
        >>> prune_plan(total=36, target=24, start=30, stop=60, interval=20)
        [(50, 33), (60, 24)]
    """
    return [
        (step, budget_at(step, total=total, target=target, start=start, stop=stop))
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
