"""What a handful of seeds on a handful of tasks says: spread, paired differences, ranks over tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired comparison, positive where the method is better than the baseline.

    Attributes:
        pairs: how many seeds both have.
        mean: of the differences.
        interval: bootstrap interval of the mean (95 %); None of fewer than two pairs.
        wins, losses: pairs above and below 0.
        sign_p: two-sided exact sign test over the pairs that are not tied; 1 without any.
    """

    pairs: int
    mean: float
    interval: tuple[float, float] | None
    wins: int
    losses: int
    sign_p: float


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n − 1); None of a single value.

    >>> spread([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    found = np.asarray(values, dtype=float)
    return float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None


def mean_text(mean: float, interval: Sequence[float] | None) -> str:
    """A difference for a table, with its interval where it is known.

    >>> mean_text(0.5, (0.03, 0.96)), mean_text(-0.1, None)
    ('+0.50 [+0.03, +0.96]', '-0.10')
    """
    return f"{mean:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def paired(groups: Sequence[Sequence[float]]) -> Difference:
    """Compare by the differences of pairs, task by task.

    The mean is that of the tasks' means, so that each task counts once. The bootstrap draws pairs
    within their task: it says how sure we are of these tasks, not of others.

    Args:
        groups: differences (method minus baseline, better is positive) by task; empty ones are left out.

    Raises:
        ValueError: there is no pair at all.
    """
    arrays = [np.asarray(g, dtype=float) for g in groups if len(g)]
    if not arrays:
        raise ValueError("groups hold no pair: the method and the baseline share no seed.")
    everything = np.concatenate(arrays)
    wins, losses = int((everything > 0).sum()), int((everything < 0).sum())
    tested = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return Difference(
        pairs=len(everything),
        mean=float(np.mean([a.mean() for a in arrays])),
        interval=bootstrap_interval(arrays),
        wins=wins,
        losses=losses,
        sign_p=float(tested),
    )


def bootstrap_interval(groups: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Percentile interval (95 %) of the mean of group means, resampled within groups; seeded.

    None where a group has fewer than two values: nothing is known of its spread.
    """
    if any(len(g) < 2 for g in groups):
        return None
    draw = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for group in groups:
        picked = draw.integers(0, len(group), size=(RESAMPLES, len(group)))
        means += group[picked].mean(axis=1) / len(groups)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Methods compared over tasks by ranks (Demšar 2006).

    Attributes:
        tasks: how many tasks all methods have.
        mean_rank: by method, 1 is best; ties share the mean of their ranks.
        friedman_p: p of the Friedman test that all methods are equal; None of fewer than three.
        critical_difference: two mean ranks further apart than this differ (Nemenyi, 5 %).
        cliques: methods that lie within it, best first; only groups that are in no larger one.
    """

    tasks: int
    mean_rank: dict[str, float]
    friedman_p: float | None
    critical_difference: float
    cliques: list[list[str]]


def ranking(scores: Mapping[str, Sequence[float]]) -> Ranking | None:
    """Rank methods on every task and say which cannot be told apart.

    CD = q₀.₀₅ sqrt(k (k + 1) / (6 N)), k methods, N tasks; q is the studentized range over √2

    Args:
        scores: method to a score per task, all in the same order, the higher the better.

    Returns:
        None of fewer than two methods or two tasks.

    >>> ranking({"a": [3.0, 3.0], "b": [2.0, 2.0], "c": [1.0, 1.0]}).mean_rank
    {'a': 1.0, 'b': 2.0, 'c': 3.0}
    """
    names = list(scores)
    table = np.array([scores[name] for name in names], dtype=float)  # (methods, tasks)
    if table.ndim != 2 or len(names) < 2 or table.shape[1] < 2:
        return None
    ranks = stats.rankdata(-table, axis=0).mean(axis=1)
    k, n = table.shape
    quantile = stats.studentized_range.ppf(CONFIDENCE, k, np.inf) / np.sqrt(2)
    critical = float(quantile * np.sqrt(k * (k + 1) / (6 * n)))
    friedman = None
    if k > 2 and not np.all(table == table[0]):
        friedman = float(stats.friedmanchisquare(*table).pvalue)
    order = [int(i) for i in np.argsort(ranks, kind="stable")]
    return Ranking(
        tasks=n,
        mean_rank={names[i]: float(ranks[i]) for i in order},
        friedman_p=friedman,
        critical_difference=critical,
        cliques=_cliques([(names[i], float(ranks[i])) for i in order], critical),
    )


def _cliques(ordered: list[tuple[str, float]], critical: float) -> list[list[str]]:
    cliques: list[list[str]] = []
    reached = 0
    for i, (_, rank) in enumerate(ordered):
        end = max(j for j, (_, other) in enumerate(ordered) if other - rank <= critical) + 1
        if end - i > 1 and end > reached:
            cliques.append([name for name, _ in ordered[i:end]])
            reached = end
    return cliques
