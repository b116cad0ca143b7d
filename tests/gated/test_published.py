"""Every known difference between the paper, the official code and this package, one test each.

The table in docs/method.md names these tests. The runs are the paper's: gates, ``preset="paper"``.
"""

import math

import pytest
import torch

from dynlora import allocation, dem_loss
from small_net import adamw, adapted, allocated, attached, data, train

PAPER = {"gated": True, "preset": "paper", "lora_dropout": 0.0}


def factors_of(module):
    return [f.parameter for f in module.factors]


def test_budget_is_a_count_where_the_printed_equation_mixes_a_share_with_a_count():
    """Printed Eq. 9 subtracts [(b0 - bT)/b0]·p³ from a count, so it never reaches bT."""
    printed_end = 36 - (36 - 24) / 36 * 1.0
    ours = allocation.budget_at(100, total=36, target=24, start=30, stop=100)
    assert printed_end == pytest.approx(35.67, abs=0.01)
    assert ours == 24


def test_budget_cuts_slowly_first_and_fast_last():
    """An eighth of the cut at half the window; AdaLoRA's (1 - p)³ would have made seven eighths."""
    half = allocation.budget_at(50, total=1000, target=200, start=0, stop=100)
    assert 1000 - half == 800 // 8


def test_nothing_is_pruned_at_the_start_of_the_window():
    """The official code cuts at least one component at p = 0, because kthvalue needs k >= 1."""
    assert not allocation.is_prune_step(15, start=15, stop=50, interval=5)
    assert allocation.budget_at(15, total=36, target=24, start=15, stop=50) == 36


def test_ties_never_cut_more_than_planned():
    """The official code cuts every score at or below the threshold."""
    scores = torch.tensor([0.5, 0.5, 0.5, 0.5])
    official = int((scores > scores.kthvalue(1).values).sum())
    assert official == 0
    ones = torch.ones(4, dtype=torch.int64)
    assert int(allocation.select_components(scores, ones, 3).sum()) == 3


def test_dem_divides_by_the_number_of_components_as_printed():
    """The official code divides by 2n."""
    a, b = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 3.0]])
    official = (a.var(dim=1).sum() + b.var(dim=1).sum()) / (2 * 1)
    torch.testing.assert_close(allocation.dem_penalty([a, b], 1), 2 * official)


def test_dem_variance_is_unbiased():
    a = torch.tensor([[0.0, 2.0]])
    assert allocation.dem_penalty([a], 1).item() == pytest.approx(2.0)  # biased: 1.0


def test_dem_stops_at_the_freeze():
    """As in the official code; the paper's Algorithm 1 never switches it off."""
    model, optimizer, allocator = attached(
        total_steps=10, compact=False, **{**PAPER, "dem_weight": 5.0}
    )
    for step in range(1, 8):
        model(data()[0]).sum().backward()
        a = factors_of(allocator.modules[0])[0]
        task = a.grad.clone()
        optimizer.step()
        assert (not torch.equal(a.grad, task)) == (step <= 5)
        optimizer.zero_grad()


def test_dem_is_added_after_gradient_clipping():
    """Like decoupled weight decay: a term in the gradient, not in the loss."""
    model, optimizer, allocator = attached(**{**PAPER, "dem_weight": 1000.0})
    model(data()[0]).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert factors_of(allocator.modules[0])[1].grad.norm() > 1


def test_scaling_keeps_the_initial_rank_for_the_whole_run():
    model, optimizer, allocator = attached(total_steps=10, **PAPER)
    train(model, optimizer, 10)
    assert [m.scaling for m in allocator.modules] == [2.0, 2.0, 2.0]


def test_importance_has_the_official_epsilon():
    assert allocation.IMPORTANCE_EPS == 1e-8


def test_scores_are_smoothed_from_the_first_step_warm_up_included():
    model, optimizer, allocator = attached(total_steps=100, **PAPER)
    train(model, optimizer, 1)
    assert all(bool((m.ema > 0).any()) for m in allocator.modules)
    assert all(float(m.ema.max()) <= 0.1 + 1e-6 for m in allocator.modules)  # 0.9·0 + 0.1·share


def test_pruned_gates_come_back_with_the_next_step_of_adamw():
    """So gradual pruning is a knock-back; the freeze is the real pruning."""
    model, optimizer, allocator = attached(prune_interval=12, compact=False, **PAPER)
    train(model, optimizer, 18)  # t0 = 6, first event after step 18
    dead = [(m.gate == 0) & ~m.live for m in allocator.modules]
    assert sum(int(d.sum()) for d in dead) == allocator.total_cost - allocator.budget > 0
    train(model, optimizer, 1)
    assert all(bool((m.gate[d] != 0).all()) for m, d in zip(allocator.modules, dead, strict=True))


def test_without_revival_every_cut_is_final():
    model, optimizer, allocator = attached(prune_interval=2, **{**PAPER, "revival": False})
    dead_before = [torch.zeros(4, dtype=torch.bool) for _ in allocator.modules]
    for _ in range(19):
        train(model, optimizer, 1)
        for module, dead in zip(allocator.modules, dead_before, strict=True):
            assert bool((module.gate[dead] == 0).all())
            dead |= ~module.live
    assert any(bool(d.any()) for d in dead_before)
    assert all(event["revived"] == 0 for event in allocator.history)


def test_initialisation_is_kaiming_uniform_with_a_zero_and_closed_gates():
    """The official code's: bound sqrt(6 / fan_in) for A and B; LoRA's reference uses a = sqrt(5)."""
    torch.manual_seed(0)
    model = adapted(**PAPER)
    for module in allocated(model, adamw(model), **PAPER).modules:
        a, b, c = factors_of(module)
        for factor in (a, b):
            bound = math.sqrt(6 / factor.shape[1])
            assert 0.5 * bound < factor.abs().max() <= bound
        assert c.tolist() == [0.0] * 4


def test_the_first_step_moves_only_the_gates():
    model, _, allocator = attached(**{**PAPER, "dem_weight": 0.0})
    x, y = data()
    ((model(x) - y) ** 2).mean().backward()
    for module in allocator.modules:
        a, b, c = factors_of(module)
        assert a.grad.abs().max() == b.grad.abs().max() == 0
        assert c.grad.abs().max() > 0


def test_steps_are_optimizer_steps_not_micro_batches():
    """The official code counts micro-batches under gradient accumulation."""
    model, optimizer, allocator = attached(total_steps=6, **PAPER)
    x, y = data()
    for micro in range(24):
        ((model(x) - y) ** 2).mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert allocator.step == 6
    assert sum(allocator.ranks().values()) == allocator.target_cost == 6


def test_the_dead_are_exactly_zero_after_the_freeze_even_without_compaction():
    model, optimizer, allocator = attached(total_steps=10, compact=False, **PAPER)
    train(model, optimizer, 10)
    assert all(bool((m.gate[~m.live] == 0).all()) for m in allocator.modules)
    assert sum(int((m.gate != 0).sum()) for m in allocator.modules) == 6
    assert dem_loss(model) > 0


# -- the init of LoRA, which is the default ------------------------------------------------------


def test_gates_of_one_take_the_first_step_of_lora():
    gated, plain = adapted(gated=True, r=4, target_r=4), adapted(r=4)
    named = {n: p for n, p in gated.named_parameters() if p.requires_grad}
    factors = {n: p for n, p in named.items() if not n.endswith(".c")}
    assert {bool((p == 1).all()) for n, p in named.items() if n not in factors} == {True}
    plain.load_state_dict(factors, strict=False)
    losses = [train(m, torch.optim.SGD(m.parameters(), 0.1), 1) for m in (gated, plain)]
    assert losses[0] == losses[1]
    for name, value in plain.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value, factors[name])


@pytest.mark.parametrize(("init_std", "variance"), [(None, 2.0), (0.2, None)])
def test_the_init_sets_the_variance_of_both_factors(init_std, variance):
    model = adapted(r=256, init_std=init_std, **PAPER)
    for module in allocated(model, adamw(model), **PAPER).modules:
        for factor in (f.detach() for f in factors_of(module)[:2]):
            expected = 0.04 if variance is None else variance / factor.shape[1]
            assert float(factor.var()) == pytest.approx(expected, rel=0.15)
