"""The method's options beside the paper's: importances, schedules, inits, budgets, presets."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from dynlora import DynLoraConfig, RankAllocator, allocation
from dynlora.adapter.components import find_gated_layers
from dynlora.measures import component_sizes
from dynlora.moments import forget_pruned_
from small_net import PAPER, adamw, adapted, attached, small_net, train


def dense_norms(model):
    """s · ‖cᵢ bᵢ aᵢᵀ‖ of every component, from dense matrices."""
    found = []
    for gated in find_gated_layers(model, "default"):
        a, b, c = (p.detach() for p in gated.parameters)
        found += [gated.scaling * (c[i] * torch.outer(b[:, i], a[i])).norm() for i in range(len(c))]
    return torch.stack(found)


def scores_after(steps, importance):
    """Model, its raw importance after each step as the test computes it, and the smoothed one."""
    model, optimizer, allocator = attached(importance=importance, prune_start=0.9, prune_end=1.0)
    raw = []
    for _ in range(steps):
        train(model, optimizer, 1)
        gates = [g.gate for g in allocator.layers]
        raw.append({
            "norm": dense_norms(model),
            "gate": torch.cat([c.detach().abs() for c in gates]),
            "sensitivity": torch.cat([(c.detach() * c.grad).abs() for c in gates]),
        }[importance])  # fmt: skip
    return raw, torch.cat([m.ema for m in allocator.layers])


@pytest.mark.parametrize("importance", ["norm", "gate", "sensitivity"])
def test_each_importance_is_its_definition_smoothed(importance):
    raw, smoothed = scores_after(5, importance)
    expected = torch.zeros_like(smoothed)
    for step in raw:
        expected = 0.9 * expected + 0.1 * step
    torch.testing.assert_close(smoothed, expected)
    assert smoothed.max() > 0


def test_importances_rank_differently():
    orders = {
        name: tuple(scores_after(5, name)[1].argsort().tolist())
        for name in ("norm", "gate", "sensitivity")
    }
    assert len(set(orders.values())) == len(orders)


@pytest.mark.parametrize("importance", ["share", "norm", "gate", "sensitivity"])
@pytest.mark.parametrize("schedule", ["slow-fast", "fast-slow"])
def test_every_choice_ends_exactly_at_the_budget(importance, schedule):
    model, optimizer, allocator = attached(importance=importance, schedule=schedule)
    train(model, optimizer, 40)
    assert sum(allocator.ranks().values()) == allocator.target_components
    assert sum(allocator.finalize_().values()) == 6


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 20), st.integers(1, 80))
def test_the_fast_first_budget_never_rises_and_is_never_above_the_slow_first_one(
    total, kept, start, length
):
    plan = {"total": total, "target": min(kept, total), "start": start, "stop": start + length}
    fast, slow = (
        [allocation.budget_at(t, **plan, schedule=s) for t in range(start + length + 3)]
        for s in ("fast-slow", "slow-fast")
    )
    assert all(late <= early for early, late in itertools.pairwise(fast))
    assert all(f <= s for f, s in zip(fast, slow, strict=True))
    assert (fast[start], fast[-1]) == (total, min(kept, total))


def test_the_allocator_follows_the_schedule_it_is_given():
    model, optimizer, allocator = attached(schedule="fast-slow", prune_interval=1)
    train(model, optimizer, 9)  # the window is 6 to 20
    assert allocator.budget == 6 + -(-6 * 11**3 // 14**3)
    assert sum(allocator.ranks().values()) == allocator.budget
    assert dict(map(tuple, allocator.plan()["schedule"]))[9] == allocator.budget


# -- budget in parameters --------------------------------------------------------------------------

costed = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=30)


@given(costed, st.integers(0, 60))
def test_what_is_kept_fits_and_nothing_left_out_would(rows, budget):
    scores = torch.tensor([float(s) for s, _ in rows])
    sizes = torch.tensor([size for _, size in rows])
    keep = allocation.select_within(scores, sizes, budget)
    spent = int(sizes[keep].sum())
    assert spent <= budget
    left_out = sizes[~keep]
    assert left_out.numel() == 0 or int(left_out.min()) > budget - spent


def test_what_is_worth_less_than_nothing_is_never_kept():
    scores, sizes = torch.tensor([1.0, -1.0]), torch.tensor([2, 1])
    assert allocation.select_within(scores, sizes, 99).tolist() == [True, False]


def test_of_no_components_none_is_kept():
    kept = allocation.select_within(torch.zeros(0), torch.zeros(0, dtype=torch.long), 5)
    assert kept.tolist() == []


def test_equal_components_stay_in_their_order():
    count = 5000  # an unstable sort shows only on many
    first = [True] * 2000 + [False] * 3000
    ones = torch.ones(count)
    assert allocation.select_within(ones, torch.full((count,), 3), 6000).tolist() == first
    assert allocation.select_components(ones, 2000).tolist() == first


def test_equal_sizes_make_both_budgets_one():
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    kept = allocation.select_within(scores, torch.full((50,), 7), 7 * 20)
    assert kept.equal(allocation.select_components(scores, 20))


def test_a_budget_in_parameters_is_a_lora_of_the_same_size():
    model, optimizer, allocator = attached(budget="parameters")
    sizes = component_sizes(allocator.layers)
    train(model, optimizer, 40)
    stored = sum(rank * sizes[name] for name, rank in allocator.ranks().items())
    allowed = 2 * sum(sizes.values())  # target_r=2
    assert allowed - min(sizes.values()) < stored <= allowed


def uneven():
    """Two modules whose components differ in size, 12 and 46 numbers."""
    config = DynLoraConfig(
        target_modules=["0", "1"], init_r=6, target_r=3, budget="parameters", **PAPER
    )
    model = get_peft_model(small_net((6, 6, 40)), config)
    optimizer = adamw(model)
    return model, optimizer, RankAllocator(model, optimizer, total_steps=20)


def test_a_run_with_a_budget_in_parameters_resumes_after_the_freeze_too():
    model, optimizer, allocator = uneven()
    for step in range(15):
        model(torch.full((4, 6), step / 15)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.is_frozen
    assert sum(allocator.ranks().values()) != allocator.target_components
    again, optimizer_again, resumed = uneven()
    again.load_state_dict(model.state_dict())
    optimizer_again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(allocator.state_dict())
    assert resumed.ranks() == allocator.ranks()


def test_select_within_refuses_what_cannot_be_ranked_or_spent():
    with pytest.raises(ValueError, match="scores hold NaN"):
        allocation.select_within(torch.tensor([float("nan")]), torch.tensor([1]), 1)
    with pytest.raises(ValueError, match="budget=-1 must be 0 or more"):
        allocation.select_within(torch.tensor([1.0]), torch.tensor([1]), -1)


# -- initial values --------------------------------------------------------------------------------


def test_the_init_of_lora_takes_the_first_step_of_lora():
    dynamic = adapted(init="lora", init_r=4, target_r=4, lora_alpha=4)
    plain = get_peft_model(
        small_net(), LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1", "2"])
    )
    trained = {n: p for n, p in dynamic.named_parameters() if p.requires_grad}
    gates = [p for n, p in trained.items() if n.endswith(".c")]
    factors = {n: p for n, p in trained.items() if not n.endswith(".c")}
    assert len(gates) == 3
    assert all(bool((gate == 1).all()) for gate in gates)
    plain.load_state_dict(factors, strict=False)
    losses = [train(m, torch.optim.SGD(m.parameters(), 0.1), 1) for m in (dynamic, plain)]
    assert losses[0] == losses[1]
    for name, value in plain.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value, factors[name])


@pytest.mark.parametrize(("init", "variance"), [("kaiming", 2.0), ("kaiming-lora", 1 / 3)])
def test_the_init_sets_the_variance_of_both_factors(init, variance):
    model = adapted(init_r=256, init=init)
    for gated in find_gated_layers(model, "default"):
        a, b, c = (p.detach() for p in gated.parameters)
        assert float(a.var()) * a.shape[1] == pytest.approx(variance, rel=0.15)
        assert float(b.var()) * b.shape[1] == pytest.approx(variance, rel=0.15)
        assert not c.any()


# -- the optimizer's memory ------------------------------------------------------------------------


def test_forgetting_clears_the_state_of_the_pruned_alone():
    model, optimizer, allocator = attached()
    train(model, optimizer, 3)
    gated = allocator.layers[0]
    gated.live[1] = False
    forget_pruned_(allocator.layers, optimizer)
    a, b, c = (optimizer.state[p]["exp_avg"] for p in gated.parameters)
    assert not (a[1].any())
    assert not (b[:, 1].any())
    assert not (c[1].any())
    assert a[0].any()
    assert b[:, 0].any()
    assert c[0].any()
    other = allocator.layers[1].parameters[0]
    assert optimizer.state[other]["exp_avg"].abs().sum(1).all()


def gates_one_step_after_the_first_cut(**fields):
    """Gates of the cut components after a step without any gradient: momentum alone moves them."""
    model, optimizer, allocator = attached(dem_weight=0.0, **fields)
    while not allocator.history:
        train(model, optimizer, 1)
    cut = [~m.live for m in allocator.layers]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.zero_()
    optimizer.step()
    return torch.cat([m.gate.detach()[c] for m, c in zip(allocator.layers, cut, strict=True)])


def test_old_momentum_revives_a_cut_gate_unless_it_is_forgotten():
    plan = {"prune_start": 0.1, "prune_interval": 10, "schedule": "fast-slow"}
    assert gates_one_step_after_the_first_cut(**plan).abs().min() > 0
    assert not gates_one_step_after_the_first_cut(**plan, forget_pruned=True).any()


# -- the paper's setting ---------------------------------------------------------------------------


def test_the_paper_preset_fills_what_is_left_out_and_nothing_else():
    config = DynLoraConfig(target_r=2, preset="paper", dem_weight=0.5)
    assert (config.lora_dropout, config.lora_alpha, config.init_r) == (0.1, 8, 3)
    assert (config.importance, config.schedule, config.budget) == (
        "share",
        "slow-fast",
        "components",
    )
    assert config.dem_weight == 0.5


def test_a_preset_survives_its_round_trip(tmp_path):
    config = DynLoraConfig(preset="paper", target_modules=["q"], importance="norm")
    config.save_pretrained(tmp_path)
    again = DynLoraConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.importance == "norm"


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("importance", "'share', 'norm', 'gate', 'sensitivity'"),
        ("schedule", "'slow-fast', 'fast-slow'"),
        ("init", "'kaiming', 'kaiming-lora', 'lora'"),
        ("budget", "'components', 'parameters'"),
        ("preset", "'paper', None"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(field, known):
    with pytest.raises(ValueError, match=f"{field}='best' must be one of {known}"):
        DynLoraConfig(**{field: "best"})


def test_another_choice_cannot_take_over_a_run():
    model, optimizer, allocator = attached()
    train(model, optimizer, 2)
    saved = allocator.state_dict()
    other = attached(importance="gate")[2]
    with pytest.raises(ValueError, match="importance"):
        other.load_state_dict(saved)
