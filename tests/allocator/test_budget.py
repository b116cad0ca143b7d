"""The budget of Eq. 9 in a run: it is kept at every step, and what comes out is no larger than asked."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import RankAllocator, allocation
from small_net import TARGETS, adamw, adapted, allocated, attached, data, small_net, train


def lora_parameters(model):
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def lora_of_rank(rank, widths=(6, 7, 5, 4)):
    return lora_parameters(
        get_peft_model(small_net(widths), LoraConfig(r=rank, target_modules=TARGETS))
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (7, {}),
        (40, {"prune_interval": 1000}),
        (40, {"prune_interval": 1, "target_r": 0.5}),
        (40, {"r": 2, "target_r": 2}),
        (40, {"target_r": 1.7}),
        (40, {"prune_start": 0.0, "prune_end": 1.0}),
        (40, {"compact": False, "target_r": 0.5}),
        (40, {"revival": True, "target_r": 1}),
        (40, {"rank_pattern": {"1": 7}, "alpha_pattern": {"1": 3}}),
        (40, {"use_rslora": True, "target_r": 0.5}),
        (40, {"importance": "share"}),
        (40, {"importance": "norm"}),
        (40, {"budget": "components", "target_r": 0.34}),
    ],
    ids=str,
)
def test_the_budget_is_kept_and_finalizing_changes_no_function(steps, fields, gated):
    model, optimizer, allocator = attached(total_steps=steps, gated=gated, **fields)
    train(model, optimizer, steps)
    assert allocator.is_frozen
    cheapest = min(allocator._costs)
    assert allocator.target_cost - cheapest < allocator.cost <= allocator.target_cost
    x, _ = data()
    before = model.eval()(x)
    ranks = allocator.finalize_()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert type(model.peft_config["default"]) is LoraConfig
    if allocator.settings.budget == "parameters":
        assert lora_parameters(model) <= fields.get("target_r", 2) * lora_of_rank(1)
    else:
        assert sum(ranks.values()) == 1


@settings(max_examples=15)
@given(
    st.tuples(*[st.integers(1, 40)] * 4),
    st.integers(1, 5),
    st.floats(0.3, 1),
    st.booleans(),
    st.integers(0, 99),
)
def test_what_comes_out_is_never_larger_than_a_lora_of_the_target_rank(
    widths, r, share, revival, seed
):
    target = r * share
    model = adapted(widths=widths, r=r, seed=seed)
    optimizer = adamw(model)
    costs = [a + b for a, b in itertools.pairwise(widths)]
    fields = {"target_r": target, "revival": revival, "prune_interval": 2}
    if int(target * sum(costs)) < max(costs):
        return  # refused; see test_checks
    allocator = allocated(model, optimizer, total_steps=8, **fields)
    train(model, optimizer, 8)
    allocator.finalize_()
    assert 0 < lora_parameters(model) <= target * sum(costs) + 1e-6


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 9), st.integers(1, 30))
def test_the_budget_is_eq_9_on_the_sum_of_costs(widths, start, length):
    total = sum(4 * w for w in widths)
    plan = {"total": total, "target": total // 2, "start": start, "stop": start + length}
    values = [allocation.budget_at(t, **plan) for t in range(start + length + 3)]
    assert values[start] == total
    assert values[-1] == total // 2
    for t in range(start, start + length):
        p = (t - start) / length
        assert values[t] == total - int((total - total // 2) * p**3 + 1e-9)


@pytest.mark.parametrize("importance", ["sensitivity", "norm"])
def test_a_floor_keeps_so_many_components_in_every_module(importance):
    model, optimizer, allocator = attached(min_r=1, target_r=1.4, importance=importance)
    with torch.no_grad():
        allocator.modules[1].factors[0].parameter.mul_(1e-3)  # worth next to nothing
    train(model, optimizer, 40)
    assert min(allocator.ranks().values()) == 1
    assert allocator.cost <= allocator.target_cost


def test_each_pruning_keeps_to_the_plan():
    model, optimizer, allocator = attached(prune_interval=2)
    plan = dict(map(tuple, allocator.plan()["schedule"]))
    for step in range(1, 41):
        train(model, optimizer, 1)
        if step in plan:
            assert allocator.budget == plan[step]
            assert allocator.cost <= plan[step]
    assert [event["step"] for event in allocator.history] == list(plan)


def test_the_budget_in_parameters_counts_those_that_stay():
    _, _, allocator = attached()
    assert allocator.plan()["component_sizes"] == {
        "layers.0": 6 + 7, "layers.1": 7 + 5, "layers.2": 5 + 4
    }  # fmt: skip
    assert (allocator.total_cost, allocator.target_cost) == (4 * 34, 2 * 34)


@pytest.mark.parametrize("gated", [False, True])
def test_a_module_that_falls_to_rank_zero_stops_computing(gated):
    model, optimizer, allocator = attached(total_steps=20, target_r=1, gated=gated)
    middle = allocator.modules[1]
    with torch.no_grad():
        middle.factors[0].parameter.zero_()  # A = 0: worth nothing
    for _ in range(20):
        model(data()[0]).sum().backward()
        if not middle.is_dropped:
            for factor in middle.factors:
                factor.parameter.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.ranks()["layers.1"] == 0
    assert "default" not in middle.layer.lora_A
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    allocator.finalize_()
    lora_a = getattr(model.get_base_model().layers[1], "lora_A", {})
    assert "default" not in lora_a


def test_without_revival_every_cut_is_final():
    model, optimizer, allocator = attached(prune_interval=2, target_r=0.5)
    dead = [torch.zeros(4, dtype=torch.bool) for _ in allocator.modules]
    for _ in range(19):
        train(model, optimizer, 1)
        for module, gone in zip(allocator.modules, dead, strict=True):
            assert not module.factors[1].parameter[:, gone].any()
            assert not module.live[gone].any()
            gone |= ~module.live
    assert sum(int(gone.sum()) for gone in dead) > 6
    assert [event["revived"] for event in allocator.history] == [0] * len(allocator.history)


def test_with_revival_momentum_brings_pruned_components_back():
    model, optimizer, allocator = attached(prune_interval=12, compact=False, revival=True)
    train(model, optimizer, 18)  # t0 = 6, first event after step 18
    dead = [~m.live for m in allocator.modules]
    assert sum(int(d.sum()) for d in dead) > 0
    train(model, optimizer, 1)
    for module, gone in zip(allocator.modules, dead, strict=True):
        assert bool(module.factors[1].parameter[:, gone].any(0).all())


@pytest.mark.parametrize("gated", [False, True])
def test_the_dead_are_exactly_zero_after_the_freeze_even_without_compaction(gated):
    model, optimizer, allocator = attached(total_steps=20, compact=False, gated=gated, target_r=0.5)
    train(model, optimizer, 20)
    for module in allocator.modules:
        assert module.rank == 4
        for factor in module.switches:
            others = [d for d in range(factor.parameter.ndim) if d != factor.dim]
            norms = factor.parameter.detach().square().sum(others) if others else factor.parameter
            assert (norms != 0).tolist() == module.live.tolist()


@pytest.mark.parametrize("gated", [False, True])
def test_freezing_early_meets_the_budget_at_once(gated):
    model, optimizer, allocator = attached(total_steps=100, gated=gated, target_r=1)
    train(model, optimizer, 5)
    allocator.freeze_()
    assert allocator.cost <= allocator.target_cost
    ranks = allocator.ranks()
    train(model, optimizer, 5)
    allocator.freeze_()  # a second time changes nothing
    assert allocator.ranks() == ranks == allocator.finalize_()


@pytest.mark.parametrize("steps", [10, 13, 15, 19])  # at a prune event, and on the way back from it
@pytest.mark.parametrize("fields", [{}, {"gated": True, "revival": True}], ids=str)
def test_finalizing_before_the_freeze_keeps_the_function_and_warns(steps, fields):
    model, optimizer, allocator = attached(total_steps=40, prune_interval=4, **fields)
    train(model, optimizer, steps)
    before = model(data()[0])
    with pytest.warns(
        UserWarning, match=f"ended after {steps} of 40 steps, before the ranks are frozen at"
    ):
        allocator.finalize_()
    torch.testing.assert_close(model(data()[0]), before, rtol=1e-5, atol=1e-5)
    assert lora_parameters(model) > allocator.target_cost


def test_an_adapter_of_a_run_that_ended_can_be_cut_again(tmp_path):
    """Modules of rank 0 are unknown to the second run, and nothing trips over them."""
    model, optimizer, allocator = attached(total_steps=20, target_r=0.5)
    train(model, optimizer, 20)
    first = allocator.finalize_()
    assert 0 in first.values()
    again = RankAllocator(model, optimizer := adamw(model), total_steps=10, target_r=1)
    train(model, optimizer, 10)
    assert set(again.ranks()) == {name for name, rank in first.items() if rank}
    again.finalize_()


def test_scaling_stays_the_users_for_the_whole_run():
    model, optimizer, allocator = attached(total_steps=20, target_r=1, lora_alpha=12)
    seen = set()
    for _ in range(20):
        train(model, optimizer, 1)
        seen |= {m.scaling for m in allocator.present}
    assert seen == {3.0}
    allocator.finalize_()
    config = model.peft_config["default"]
    for module in allocator.present:
        assert module.layer.scaling["default"] == pytest.approx(3.0)
        assert isinstance(module.layer, nn.Module)
    assert config.lora_alpha == 12
