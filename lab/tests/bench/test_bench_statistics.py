"""Spread, paired differences and ranks over tasks, against cases worked by hand or by scipy."""

import numpy as np
import pytest
from scipy import stats

from dynlora_lab.bench.statistics import bootstrap_interval, paired, ranking, spread


def test_a_single_value_has_no_spread():
    assert spread([3.0]) == (3.0, None)


def test_the_interval_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(3).normal(0.5, 1.0, size=12)
    low, high = bootstrap_interval([values])
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_the_interval_is_the_same_every_time():
    values = [np.array([0.1, 0.4, -0.2])]
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_each_task_counts_once_however_many_seeds_it_has():
    difference = paired([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0]])
    assert difference.mean == 0
    assert (difference.pairs, difference.wins, difference.losses) == (6, 4, 2)


def test_one_pair_gives_a_mean_and_no_interval():
    assert paired([[0.5]]).interval is None
    assert paired([[0.5, 0.7], [0.1]]).interval is None


def test_the_sign_test_leaves_ties_out():
    assert paired([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]).sign_p == pytest.approx(2 / 2**5)
    assert paired([[0.0, 0.0]]).sign_p == 1


def test_without_a_pair_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="share no seed"):
        paired([[], []])


def test_the_critical_difference_is_demsars():
    """Five methods, 30 tasks: q = 2.728 in the table of Demšar (2006), CD = 1.114."""
    scores = {m: list(np.random.default_rng(i).random(30)) for i, m in enumerate("abcde")}
    assert ranking(scores).critical_difference == pytest.approx(
        2.728 * (5 * 6 / (6 * 30)) ** 0.5, abs=1e-3
    )


def test_cliques_join_what_is_close_and_part_what_is_far():
    tasks = 40
    scores = {"good": [3.0] * tasks, "better": [4.0, 2.9] * (tasks // 2), "bad": [0.0] * tasks}
    ranked = ranking(scores)
    assert ranked.mean_rank == {"good": 1.5, "better": 1.5, "bad": 3.0}
    assert ranked.cliques == [["good", "better"]]
    assert ranked.friedman_p < 1e-9


def test_equal_methods_are_one_clique():
    ranked = ranking({m: [1.0, 2.0] for m in "abc"})
    assert ranked.cliques == [["a", "b", "c"]]
    assert ranked.friedman_p is None


@pytest.mark.parametrize("scores", [{}, {"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}])
def test_too_little_cannot_be_ranked(scores):
    assert ranking(scores) is None
