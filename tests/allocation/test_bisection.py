"""The search for the smallest budget whose loss is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlora.allocation.bisection import smallest_budget


@given(
    total=st.integers(2, 10_000),
    threshold=st.integers(1, 10_000),
    lowest=st.integers(1, 50),
)
def test_a_falling_loss_is_bisected_to_the_very_threshold(total, threshold, lowest):
    lowest, threshold = min(lowest, total), min(threshold, total)
    curve = smallest_budget(
        lambda budget: 1.0 if budget >= threshold else 2.0,
        lowest=lowest,
        accepted=total,
        limit=1.01,
        precision=0.0,
    )
    assert curve.budget == max(threshold, lowest)


@given(
    losses=st.lists(st.floats(0.5, 3.0), min_size=30, max_size=30),
    first=st.lists(st.integers(1, 30), max_size=5),
)
def test_what_is_chosen_was_measured_and_accepted_whatever_the_losses(losses, first):
    curve = smallest_budget(
        lambda budget: losses[budget - 1],
        lowest=1,
        accepted=30,
        limit=1.1,
        first=first,
    )
    assert curve.budget == 30 or dict(curve.tried)[curve.budget] <= 1.1


@pytest.mark.parametrize("rise", [0.01, 0.1, 1.0])
def test_a_higher_limit_never_needs_a_larger_budget(rise):
    def budget(limit):
        return smallest_budget(
            lambda b: 1 + 5 / b, lowest=1, accepted=512, limit=limit, precision=0.0
        ).budget

    assert budget(1 + 2 * rise) <= budget(1 + rise)


@given(
    total=st.integers(2, 100_000), threshold=st.integers(1, 100_000), precision=st.floats(0.01, 1)
)
def test_the_answer_is_known_within_the_precision(total, threshold, precision):
    threshold = min(threshold, total)
    curve = smallest_budget(
        lambda budget: 1.0 if budget >= threshold else 2.0,
        lowest=1,
        accepted=total,
        limit=1.01,
        precision=precision,
    )
    assert threshold <= curve.budget <= max(threshold * (1 + precision), threshold + 1)


def test_budgets_to_try_first_are_tried_until_one_is_refused():
    curve = smallest_budget(
        lambda budget: 1.0 if budget >= 40 else 2.0,
        lowest=1,
        accepted=128,
        limit=1.01,
        first=(64, 32, 16),
    )
    assert [budget for budget, _ in curve.tried] == [64, 32, 45, 38, 41, 39, 40]
    assert curve.budget == 40
