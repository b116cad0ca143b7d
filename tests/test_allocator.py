"""RankAllocator in plain loops: the budget is met exactly, and wrong use fails loudly."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import DynLoraConfig, RankAllocator, dem_loss, finalize_
from small_net import adamw, adapted, attached, data, small_net, train


def live(allocator):
    return sum(allocator.ranks().values())


# -- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (3, {}),
        (1, {}),
        (40, {"prune_interval": 1000}),
        (40, {"prune_interval": 1}),
        (40, {"init_r": 2, "target_r": 2}),
        (40, {"target_r": 0.5}),
        (40, {"target_r": 1.7}),
        (40, {"prune_start": 0.0, "prune_end": 1.0}),
        (40, {"compact": False}),
        (40, {"revival": False}),
        (40, {"rank_pattern": {"1": 7}}),
        (40, {"use_rslora": True}),
    ],
    ids=str,
)
def test_the_budget_is_met_exactly(steps, fields):
    model, optimizer, allocator = attached(total_steps=steps, **fields)
    train(model, optimizer, steps)
    x, _ = data()
    model.eval()
    before = model(x)
    expected = max(1, int(allocator.config.target_r * 3 + 0.5))
    assert live(allocator) == allocator.target_components == expected
    ranks = allocator.finalize_()
    assert sum(ranks.values()) == expected
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert type(model.peft_config["default"]) is LoraConfig


def test_the_budget_is_met_when_all_scores_tie():
    model, optimizer, allocator = attached(total_steps=2)
    for gated in allocator.layers:
        a, b, c = gated.parameters
        nn.init.ones_(a)
        nn.init.ones_(b)
        nn.init.ones_(c)
    model(data()[0]).mul(0).sum().backward()  # no gradient: every component stays equal
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert list(allocator.ranks().values()) == [4, 2, 0]  # earlier modules first


def test_a_module_that_falls_to_rank_zero_stops_computing():
    model, optimizer, allocator = attached(total_steps=10, target_r=1)
    with torch.no_grad():
        allocator.layers[1].parameters[0].zero_()  # A = 0: no share in anything
    for _ in range(10):
        model(data()[0]).sum().backward()
        allocator.layers[1].is_dropped or allocator.layers[1].parameters[0].grad.zero_()
        allocator.layers[1].is_dropped or allocator.layers[1].parameters[2].grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.ranks()["layers.1"] == 0
    assert "default" not in allocator.layers[1].layer.lora_A
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    allocator.finalize_()
    assert type(model.get_base_model().layers[1]) is nn.Linear


def test_skipped_steps_of_a_grad_scaler_do_not_count():
    model, optimizer, allocator = attached(total_steps=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = data()
    for step in range(9):
        loss = ((model(x) - y) ** 2).mean() * (float("inf") if step in (0, 3, 4) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert allocator.step == 6
    assert live(allocator) == allocator.target_components


def fused(model):
    return adamw(model, fused=True)


def test_a_fused_optimizer_under_a_grad_scaler_gets_the_same_dem_and_skips_alike():
    results = []
    for build in (adamw, fused):
        model, optimizer, allocator = attached(total_steps=8, optimizer=build, dem_weight=2.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        x, y = data()
        for step in range(9):
            loss = ((model(x) - y) ** 2).mean() * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert allocator.step == 8
        results.append([p.detach() for m in allocator.layers for p in m.parameters])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_closure_computes_the_gradients_that_dem_is_added_to():
    results = []
    for use_closure in (False, True):
        model, optimizer, allocator = attached(total_steps=8, dem_weight=2.0)
        x, y = data()

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            return loss

        for _ in range(8):
            if use_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append([p.detach() for m in allocator.layers for p in m.parameters])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_dem_gradient_is_autograds(accumulation):
    """Task loss and DEM: task gradient + gradient of η·R, however many micro-batches."""
    model, optimizer, allocator = attached(dem_weight=0.3, dtype=torch.float64)
    x, y = (t.double() for t in data())
    with torch.no_grad():
        for gated in allocator.layers:
            gated.gate.fill_(0.1)
    for _ in range(accumulation):
        (((model(x) - y) ** 2).mean() / accumulation).backward()
    optimizer.step()
    actual = [p.grad.clone() for m in allocator.layers for p in m.parameters]
    fresh = adapted(dtype=torch.float64, dem_weight=0.3)
    parameters = [p for p in fresh.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            if name.endswith(".c"):
                p.fill_(0.1)
    (((fresh(x) - y) ** 2).mean() + 0.3 * dem_loss(fresh)).backward()
    by_shape = sorted((tuple(p.shape), p.grad.norm().item()) for p in parameters)
    seen = sorted((tuple(g.shape), g.norm().item()) for g in actual)
    for (shape, expected), (same, norm) in zip(by_shape, seen, strict=True):
        assert shape == same
        assert norm == pytest.approx(expected, rel=1e-6)


def test_freezing_early_meets_the_budget_at_once():
    model, optimizer, allocator = attached(total_steps=100)
    train(model, optimizer, 5)
    allocator.freeze_()
    assert live(allocator) == allocator.target_components
    train(model, optimizer, 5)
    assert live(allocator) == allocator.target_components
    allocator.freeze_()  # a second time changes nothing
    allocator.finalize_()


def test_compaction_leaves_a_lora_of_the_same_ranks():
    model, optimizer, allocator = attached(total_steps=10)
    train(model, optimizer, 10)
    for gated in allocator.layers:
        rank = gated.num_components
        a, b, c = gated.parameters
        assert (a.shape[0], b.shape[1], c.shape[0]) == (rank, rank, rank)
        for p in (a, b, c):
            assert all(v.shape == p.shape for k, v in optimizer.state[p].items() if k != "step")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(map(id, optimizer.state)) == set(map(id, held))


def test_compaction_survives_a_living_graph():
    """A changed param.data shape would break this backward."""
    model, optimizer, _allocator = attached(total_steps=10)
    x, _ = data()
    train(model, optimizer, 4)
    kept_alive = model(x).sum()
    train(model, optimizer, 6)
    model(x).sum().backward()
    del kept_alive


def adafactor(model):
    return torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def sgd(model):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9
    )


@pytest.mark.parametrize("build", [adamw, fused, sgd, adafactor])
def test_masked_and_compacted_runs_have_the_same_losses(build):
    losses = []
    for compact in (False, True):
        model, optimizer, _allocator = attached(total_steps=30, compact=compact, optimizer=build)
        losses.append(train(model, optimizer, 30))
    if build is adafactor:  # its factored moments average over dead rows too, so only to the freeze
        assert losses[0][:15] == losses[1][:15]
        assert all(abs(a - b) < 5e-2 for a, b in zip(*losses, strict=True))
    else:
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


class CallsSuper(torch.optim.AdamW):
    """Both its own step and the one it calls fire torch's hooks."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_subclass_that_calls_super_makes_one_step_not_two():
    losses = []
    for build in (
        adamw,
        lambda m: CallsSuper([p for p in m.parameters() if p.requires_grad], 1e-2),
    ):
        model, optimizer, allocator = attached(total_steps=10, optimizer=build, dem_weight=3.0)
        losses.append(train(model, optimizer, 10))
        assert allocator.step == 10
    assert losses[0] == losses[1]


def test_an_exception_inside_a_step_does_not_disturb_the_count():
    model, optimizer, allocator = attached(total_steps=10)
    train(model, optimizer, 2)
    held = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = "broken"
    with pytest.raises(TypeError):
        train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = held
    train(model, optimizer, 2)
    assert allocator.step == 4


class KeepsOddState(torch.optim.SGD):
    """An optimizer with a state tensor that belongs to no component."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = torch.zeros(17)


def test_an_unknown_optimizer_state_keeps_shapes_and_says_so():
    def build(model):
        return KeepsOddState([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model, optimizer, allocator = attached(total_steps=6, optimizer=build)
    with pytest.warns(UserWarning, match="keep their place until finalize_.*'odd' of shape"):
        train(model, optimizer, 6)
    assert live(allocator) == allocator.target_components
    assert all(m.num_components == 4 for m in allocator.layers)
    assert sum(allocator.finalize_().values()) == allocator.target_components


# -- resuming a plain loop -----------------------------------------------------------------------


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("stop_at", [2, 6, 14, 19, 20, 21, 33])
def test_a_plain_loop_resumes_bit_for_bit(stop_at, compact):
    fields = {"total_steps": 40, "prune_interval": 3, "compact": compact, "target_r": 1}
    model, optimizer, allocator = attached(**fields)
    expected = train(model, optimizer, 40)
    first, optimizer, one = attached(**fields)
    losses = train(first, optimizer, stop_at)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), one.state_dict()))
    second = adapted(target_r=1, prune_interval=3, compact=compact, seed=99)
    second.load_state_dict(saved[0])
    optimizer = adamw(second)
    optimizer.load_state_dict(saved[1])
    two = RankAllocator(second, optimizer, total_steps=40)
    two.load_state_dict(saved[2])
    losses += train(second, optimizer, 40 - stop_at)
    assert losses == expected
    assert two.ranks() == allocator.ranks()
    assert two.history == allocator.history
    whole, parts = model.state_dict(), second.state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def saved_progress(steps=8, **fields):
    model, optimizer, allocator = attached(**fields)
    train(model, optimizer, steps)
    return model.state_dict(), allocator.state_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_steps": 50}, "total_steps=50 differs from the interrupted run's 40"),
        ({"target_r": 3}, "target_components=9 differs from the interrupted run's 6"),
        ({"prune_end": 0.7}, "prune_end=0.7 differs"),
        ({"prune_interval": 5}, "prune_interval=5 differs from the interrupted run's 10"),
        ({"revival": False}, "revival=False differs"),
        ({"dem_weight": 0.5}, "dem_weight=0.5 differs from the interrupted run's 0.1"),
        (
            {"lora_alpha": 32},
            "scaling=8.0 of module 'layers.0' differs from the interrupted run's 2.0",
        ),
        (
            {"target_modules": ["0", "1"], "target_r": 3},
            r"modules differ .*\['layers.2'\] were adapted",
        ),
    ],
    ids=str,
)
def test_resuming_another_plan_is_refused(fields, message):
    weights, progress = saved_progress()
    model, _, allocator = attached(**fields)
    model.load_state_dict(weights, strict="target_modules" not in fields)
    with pytest.raises(ValueError, match=message):
        allocator.load_state_dict(progress)


def test_resuming_without_the_models_scores_is_refused():
    _, progress = saved_progress()
    _, _, allocator = attached()
    with pytest.raises(ValueError, match="holds no importance scores: load the checkpoint"):
        allocator.load_state_dict(progress)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"step": None}, "state holds step=None, no int"),
        ({"step": True}, "state holds step=True, no int"),
        ({"step": 41}, "state is damaged: step=41 of 40"),
        ({"step": -1}, "state is damaged: step=-1 of 40"),
        ({"window": [9, 3]}, r"damaged: .* window=\[9, 3\]"),
        ({"history": [3]}, "state is damaged"),
        ({"modules": {}}, r"modules differ .* \['layers.0', 'layers.1', 'layers.2'\] are new"),
        ({"is_frozen": True}, "holds 12 live components, the interrupted run was frozen at 6"),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(damage, message):
    weights, progress = saved_progress(steps=3)
    model, _, allocator = attached()
    model.load_state_dict(weights)
    with pytest.raises(ValueError, match=message):
        allocator.load_state_dict({**progress, **damage})
    assert allocator.step == 0
    allocator.load_state_dict(progress)
    assert allocator.step == 3


def test_resuming_from_scores_that_are_not_finite_is_refused():
    weights, progress = saved_progress()
    model, _, allocator = attached()
    model.load_state_dict(weights)
    allocator.layers[2].ema[0] = float("inf")
    with pytest.raises(ValueError, match="not finite, first in module 'layers.2'"):
        allocator.load_state_dict(progress)


def test_resuming_another_versions_state_is_refused():
    _, progress = saved_progress()
    _, _, allocator = attached()
    with pytest.raises(ValueError, match="state has version 99, this dynlora reads 1"):
        allocator.load_state_dict({**progress, "version": 99})


def test_resuming_onto_other_ranks_is_refused():
    _, progress = saved_progress()
    _, _, allocator = attached(init_r=5, lora_alpha=10)
    with pytest.raises(ValueError, match="holds 15 components, the interrupted run had 12"):
        allocator.load_state_dict(progress)


# -- failing loudly ------------------------------------------------------------------------------


def test_a_model_without_a_dynlora_adapter_is_refused():
    plain = get_peft_model(small_net(), LoraConfig(target_modules=["0"]))
    with pytest.raises(
        ValueError, match=r"no DynLora adapter \(adapters found: default \(LORA\)\)"
    ):
        RankAllocator(plain, adamw(plain), total_steps=5)
    net = small_net()
    with pytest.raises(
        ValueError, match=r"SmallNet has no DynLora adapter \(adapters found: none\)"
    ):
        RankAllocator(net, adamw(net), total_steps=5)


def test_an_adapter_that_is_not_trainable_is_refused():
    model = adapted()
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="adapter='default' is not trainable"):
        RankAllocator(model, optimizer, total_steps=5)


def test_unknown_total_steps_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"total_steps is unknown.*Pass RankAllocator"):
        RankAllocator(model, adamw(model))


def test_total_steps_may_come_from_the_config():
    model = adapted(total_steps=9)
    assert RankAllocator(model, adamw(model)).total_steps == 9


def test_two_different_total_steps_are_refused():
    model = adapted(total_steps=9)
    with pytest.raises(ValueError, match="total_steps=8 differs from DynLoraConfig"):
        RankAllocator(model, adamw(model), total_steps=8)


def test_stepping_past_total_steps_is_refused():
    model, optimizer, _ = attached(total_steps=4)
    train(model, optimizer, 4)
    with pytest.raises(RuntimeError, match="step beyond total_steps=4"):
        train(model, optimizer, 1)


def test_an_optimizer_without_the_adapter_is_refused():
    model = adapted()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="SGD does not hold the adapter parameters of module 'layers.0'"
    ):
        RankAllocator(model, other, total_steps=5)


def test_an_optimizer_without_step_hooks_is_refused():
    model = adapted()
    with pytest.raises(TypeError, match="optimizer=str must be a torch.optim.Optimizer"):
        RankAllocator(model, "adamw", total_steps=5)


def test_a_budget_above_the_initial_components_is_refused():
    model = adapted(init_r=4, target_r=4, rank_pattern={"0": 1})
    with pytest.raises(ValueError, match="asks for 12 components.* start with 9"):
        RankAllocator(model, adamw(model), total_steps=5)


def test_an_allocator_that_never_saw_a_step_cannot_be_finalized():
    _, _, allocator = attached()
    for call in (allocator.finalize_, allocator.freeze_):
        with pytest.raises(RuntimeError, match="never saw an optimizer step"):
            call()


def test_training_without_an_allocator_fails_at_the_first_step():
    model = adapted()
    with pytest.raises(RuntimeError, match="'default' is being trained without a RankAllocator"):
        train(model, adamw(model), 1)


def test_an_allocator_on_another_optimizer_fails_at_the_first_step():
    model, _, allocator = attached()
    other = sgd(model)
    with pytest.raises(
        RuntimeError, match=r"stepped by an optimizer \(SGD\) that its RankAllocator"
    ):
        train(model, other, 1)
    assert allocator.step == 0


def test_training_gates_without_pruning_needs_no_allocator():
    model = adapted(init_r=2, target_r=2)
    losses = train(model, adamw(model), 20)
    assert losses[-1] < losses[0]


def test_a_forgotten_model_no_longer_waits_for_its_allocator():
    adapted()
    gc.collect()
    other = small_net()
    train(other, adamw(other), 1)


def test_training_after_detach_scores_nothing():
    model, optimizer, allocator = attached()
    train(model, optimizer, 3)
    allocator.detach()
    train(model, optimizer, 3)
    assert allocator.step == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", [0, 1, 2])
def test_a_bad_gradient_stops_the_step_before_it_does_harm(factor, bad):
    model, optimizer, allocator = attached(total_steps=10, prune_interval=2)
    train(model, optimizer, 2)
    model(data()[0]).sum().backward()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    allocator.layers[1].parameters[factor].grad.view(-1)[0] = bad
    kind = ("A", "B", "the gate c")[factor]
    message = rf"gradient at step 3 in {kind} of module 'layers.1' \(1 modules in all\)"
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step()
    assert allocator.step == 2
    after = (model.state_dict(), optimizer.state_dict()["state"])
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    optimizer.zero_grad()
    train(model, optimizer, 8)  # the run can go on
    assert live(allocator) == allocator.target_components


@pytest.mark.parametrize("factor", [0, 1, 2])
def test_bad_weights_are_reported_with_the_modules_name_and_prune_nothing(factor):
    model, optimizer, allocator = attached(total_steps=10, prune_interval=2)
    train(model, optimizer, 2)
    scores = [m.ema.clone() for m in allocator.layers]
    with torch.no_grad():
        allocator.layers[1].parameters[factor].view(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"importance at step 3 in module 'layers.1' \(1 "):
        optimizer.step()
    assert all(bool(m.live.all()) for m in allocator.layers)
    assert all(torch.equal(m.ema, s) for m, s in zip(allocator.layers, scores, strict=True))


@pytest.mark.parametrize("steps", [10, 13, 15, 19])  # at a prune event, and on the way back from it
def test_finalizing_before_the_freeze_keeps_the_function_and_warns(steps):
    model, optimizer, allocator = attached(total_steps=40, prune_interval=4)
    train(model, optimizer, steps)
    x, _ = data()
    before = model(x)
    with pytest.warns(
        UserWarning, match=f"ended after {steps} of 40 steps, before the ranks are frozen at"
    ):
        ranks = allocator.finalize_()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert sum(ranks.values()) > allocator.target_components


def test_finalizing_an_untrained_adapter_is_refused_and_changes_nothing():
    model = adapted()
    with pytest.raises(ValueError, match="no live component: every gate is 0"):
        finalize_(model)
    assert isinstance(model.peft_config["default"], DynLoraConfig)


def test_a_wrong_adapter_name_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"adapter='other' must name one of .*\['default'\]"):
        finalize_(model, "other")
