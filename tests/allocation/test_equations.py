"""The equations: worked examples by hand, properties, and each error text."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from dynlora import allocation

SCORES = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=24)  # ties are likely
SIZES = st.integers(1, 5)


def products(a, b, c):
    return allocation.component_products(a @ a.T, b.T @ b, c)


def random_module(rank, width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in
            ((rank, width), (height, rank), (rank,))]  # fmt: skip


# -- Eq. 7: importance ---------------------------------------------------------------------------


def test_importance_of_two_orthogonal_components_by_hand():
    a = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # norms 3 and 1
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # norms 1 and 2
    c = torch.tensor([1.0, -2.0])  # component norms 3 and 4, together 5
    shares = allocation.component_importance(products(a, b, c))
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.8]))


def test_importance_of_cancelling_components_may_exceed_one():
    a, b = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 1.0]])
    shares = allocation.component_importance(products(a, b, torch.tensor([2.0, -1.0])))
    torch.testing.assert_close(shares, torch.tensor([2.0, 1.0]))


def test_importance_of_an_untrained_module_is_zero_not_nan():
    a, b, _ = random_module(3, 4, 5, seed=0)
    shares = allocation.component_importance(products(a, b, torch.zeros(3, dtype=torch.float64)))
    assert shares.tolist() == [0.0, 0.0, 0.0]


@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_importance_equals_the_dense_definition(rank, width, height, seed):
    a, b, c = random_module(rank, width, height, seed)
    module = reference.Module(torch.zeros(height, width, dtype=torch.float64), 0.0, a, b, c, 1.0)
    expected = torch.tensor(reference.importance(module), dtype=torch.float64)
    actual = allocation.component_importance(products(a, b, c))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@given(SIZES, st.integers(0, 99), st.floats(0.1, 10))
def test_importance_does_not_change_when_all_gates_are_scaled(rank, seed, factor):
    a, b, c = random_module(rank, 4, 5, seed)
    before = allocation.component_importance(products(a, b, c))
    after = allocation.component_importance(products(a, b, c * factor))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_importance_of_a_tiny_update_is_damped_not_blown_up():
    eye = torch.eye(1)
    shares = allocation.component_importance(products(eye, eye, torch.tensor([1e-8])))
    torch.testing.assert_close(shares, torch.tensor([0.5]))  # 1e-8 / (1e-8 + 1e-8)


def test_importance_of_many_modules_at_once_equals_one_by_one():
    modules = [random_module(3, 4, 5, seed) for seed in range(4)]
    each = [allocation.component_importance(products(a, b, c)) for a, b, c in modules]
    a, b, c = (torch.stack(tensors) for tensors in zip(*modules, strict=True))
    together = allocation.component_importance(allocation.component_products(a @ a.mT, b.mT @ b, c))
    torch.testing.assert_close(together, torch.stack(each), rtol=1e-12, atol=1e-12)


# -- Eq. 8: smoothing ----------------------------------------------------------------------------


def test_smoothing_two_steps_by_hand():
    ema = [torch.zeros(1)]
    allocation.smooth_importance_(ema, [torch.tensor([1.0])], beta=0.9)
    allocation.smooth_importance_(ema, [torch.tensor([0.5])], beta=0.9)
    torch.testing.assert_close(ema[0], torch.tensor([0.9 * 0.1 + 0.1 * 0.5]))


def test_smoothing_nothing_is_allowed():
    allocation.smooth_importance_([], [], beta=0.9)


# -- Eq. 9: schedule -----------------------------------------------------------------------------

plans = st.tuples(
    st.integers(1, 400),
    st.floats(0, 0.98),
    st.floats(0.01, 1),
    st.integers(1, 500),
    st.floats(0, 1),
)


@given(plans)
def test_budget_never_rises_and_ends_exactly_at_the_target(plan):
    total_steps, start_share, length, total, kept = plan
    target = max(1, int(total * kept))
    end_share = min(1.0, start_share + length)
    start, stop = allocation.pruning_window(
        total_steps, prune_start=start_share, prune_end=end_share
    )
    assert 0 <= start < stop <= total_steps
    values = [
        allocation.budget_at(t, total=total, target=target, start=start, stop=stop)
        for t in range(total_steps + 1)
    ]
    assert values[: start + 1] == [total] * (start + 1)
    assert all(late <= early for early, late in itertools.pairwise(values))
    assert set(values[stop:]) == {target}


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 59))
def test_budget_equals_the_reference(step, total, length, start):
    target = total // 2
    arguments = {"total": total, "target": target, "start": start, "stop": start + length}
    assert allocation.budget_at(step, **arguments) == reference.budget(step, **arguments)


@pytest.mark.parametrize(
    ("mean_rank", "modules", "components"), [(2, 24, 48), (0.5, 5, 3), (1.4, 3, 4), (0.1, 4, 1)]
)
def test_a_target_in_components_is_rounded_half_up_and_never_0(mean_rank, modules, components):
    assert allocation.target_cost(mean_rank, [1] * modules, in_components=True) == components


@given(st.floats(0.01, 99), st.lists(st.integers(1, 99), min_size=1, max_size=9))
def test_a_target_in_parameters_is_never_more_than_a_lora_of_that_rank_has(mean_rank, costs):
    target = allocation.target_cost(mean_rank, costs, in_components=False)
    assert target <= max(min(costs), mean_rank * sum(costs) * (1 + 1e-9) + 1e-9)
    assert target > mean_rank * sum(costs) - 1


def test_a_target_that_binary_numbers_miss_is_still_exact():
    assert allocation.target_cost(0.29, [1] * 100, in_components=False) == 29


def test_window_shares_that_binary_numbers_miss_are_still_exact():
    assert allocation.pruning_window(100, prune_start=0.29, prune_end=0.57) == (29, 57)


@pytest.mark.parametrize(("steps", "window"), [(1, (0, 1)), (2, (0, 1)), (3, (0, 1)), (7, (1, 3))])
def test_window_of_a_short_run(steps, window):
    assert allocation.pruning_window(steps, prune_start=0.15, prune_end=0.5) == window


def test_window_needs_a_step():
    with pytest.raises(ValueError, match="total_steps=0 must be at least 1"):
        allocation.pruning_window(0, prune_start=0.15, prune_end=0.5)


def test_a_window_that_starts_at_the_end_leaves_one_step():
    assert allocation.pruning_window(10, prune_start=1 - 1e-12, prune_end=1.0) == (9, 10)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 9))
def test_the_plan_is_every_prune_step_with_its_budget(start, length, interval):
    stop = start + length
    arguments = {"total": 30, "target": 12, "start": start, "stop": stop}
    steps = sorted({*range(start + interval, stop, interval), stop})
    expected = [(t, allocation.budget_at(t, **arguments)) for t in steps]
    assert allocation.prune_plan(**arguments, interval=interval) == expected


def test_an_interval_larger_than_the_window_still_prunes_at_its_end():
    events = [t for t in range(100) if allocation.is_prune_step(t, start=15, stop=50, interval=99)]
    assert events == [50]


# -- selection -----------------------------------------------------------------------------------

costed = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=30)


def ones(scores):
    return torch.ones(len(scores), dtype=torch.int64)


def select(scores, budget):
    """Every component costs 1."""
    return allocation.select_components(scores, ones(scores), budget)


@given(SCORES, st.data())
def test_at_equal_costs_the_budget_is_spent_exactly_and_on_the_best(scores, data):
    flat = torch.tensor(scores)
    budget = data.draw(st.integers(0, len(flat) + 3))
    keep = select(flat, budget)
    assert int(keep.sum()) == min(budget, len(flat))
    if 0 < budget < len(flat):
        assert flat[keep].min() >= flat[~keep].max()


@given(SCORES, st.data())
def test_ties_go_to_the_earlier_component(scores, data):
    flat = torch.tensor(scores)
    keep = select(flat, data.draw(st.integers(0, len(flat))))
    for value in flat.unique():
        tied = keep[flat == value].tolist()
        assert tied == sorted(tied, reverse=True)


def test_equal_components_stay_in_their_order():
    many = torch.ones(5000)  # an unstable sort shows only on many
    keep = allocation.select_components(many, 3 * ones(many), 6000)
    assert keep.tolist() == [True] * 2000 + [False] * 3000


@given(costed, st.integers(0, 60))
def test_what_is_kept_fits_and_nothing_left_out_would(rows, budget):
    scores = torch.tensor([float(s) for s, _ in rows])
    costs = torch.tensor([cost for _, cost in rows])
    keep = allocation.select_components(scores, costs, budget)
    spent = int(costs[keep].sum())
    assert spent <= budget
    left_out = costs[~keep]
    assert left_out.numel() == 0 or int(left_out.min()) > budget - spent


@given(costed, st.integers(0, 60))
def test_a_component_that_would_fit_is_left_out_only_for_denser_ones(rows, budget):
    scores = torch.tensor([float(s) for s, _ in rows])
    costs = torch.tensor([cost for _, cost in rows])
    keep = allocation.select_components(scores, costs, budget)
    for i, (score, cost) in enumerate(rows):
        denser = [
            costs[j]
            for j, (s, c) in enumerate(rows)
            if keep[j] and s * cost >= score * c and j != i
        ]
        assert keep[i] or cost > budget - sum(denser)


def test_what_is_worth_less_than_nothing_is_never_kept():
    scores, costs = torch.tensor([1.0, -1.0]), torch.tensor([2, 1])
    assert allocation.select_components(scores, costs, 99).tolist() == [True, False]


def test_of_no_components_none_is_kept():
    assert select(torch.zeros(0), 5).tolist() == []


@given(st.lists(SCORES, min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 30))
def test_the_floor_is_kept_in_every_module_with_its_best_components(modules, floor, extra):
    flat = torch.tensor([score for scores in modules for score in scores])
    sizes = [len(scores) for scores in modules]
    needed = sum(min(floor, size) for size in sizes)
    keep = allocation.select_components(
        flat, ones(flat), needed + extra, floors=[floor] * len(sizes), sizes=sizes
    )
    assert int(keep.sum()) == min(needed + extra, len(flat))
    for scores, kept in zip(flat.split(sizes), keep.split(sizes), strict=True):
        assert int(kept.sum()) >= min(floor, len(scores))
        if 0 < int(kept.sum()) < len(scores):
            assert scores[kept].min() >= scores[~kept].max()


def test_selection_refuses_a_negative_budget():
    with pytest.raises(ValueError, match="budget=-1 must be 0 or more"):
        select(torch.tensor([1.0, 2.0]), -1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_selection_refuses_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="^scores hold NaN or infinity"):
        select(torch.tensor([1.0, bad]), 1)


# -- Eq. 10: DEM ---------------------------------------------------------------------------------


def test_dem_by_hand():
    a = torch.tensor([[1.0, 3.0], [2.0, 2.0]])  # variances 2 and 0
    b = torch.tensor([[0.0, 1.0], [0.0, 5.0], [3.0, 3.0]])  # columns: variances 3 and 4
    torch.testing.assert_close(allocation.dem_penalty([a, b.T], 2), torch.tensor(4.5))


def test_dem_of_a_single_module_is_its_own():
    torch.testing.assert_close(
        allocation.dem_penalty([torch.tensor([[1.0, 3.0]])], 2), torch.tensor(1.0)
    )


def test_dem_of_vectors_with_one_entry_is_zero():
    assert allocation.dem_penalty([torch.tensor([[5.0]])], 1).item() == 0.0
    grad = torch.zeros(1, 1)
    allocation.add_dem_gradients_([grad], [torch.tensor([[5.0]])], rank_dim=0, factor=1.0)
    assert grad.item() == 0.0


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
@pytest.mark.parametrize(
    ("shape", "rank_dim"),
    [((3, 5), 0), ((1, 5), 0), ((3, 2), 0), ((5, 3), 1), ((3, 2, 4, 4), 0), ((5, 3, 1, 1), 1)],
)
def test_dem_gradient_equals_autograd(shape, rank_dim, grad_scale, count):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    weights = [w.requires_grad_() for w in drawn]
    rows = torch.cat([w.transpose(0, rank_dim).flatten(1) for w in weights])
    expected = torch.autograd.grad(0.7 * (grad_scale or 1) * rows.var(dim=1).sum(), weights)
    grads = [torch.ones(shape, dtype=torch.float64) for _ in weights]
    allocation.add_dem_gradients_(
        grads, [w.detach() for w in weights], rank_dim=rank_dim, factor=0.7, grad_scale=grad_scale
    )
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, 1 + wanted, rtol=1e-12, atol=1e-12)
