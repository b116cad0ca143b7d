"""What must hold before and during a run: wrong use and bad numbers are named, and do no harm."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import DynLoraConfig, NotFiniteError, RankAllocator, dem_loss, finalize_
from dynlora.allocator.checks import FiniteGuard
from dynlora.lora.components import find_components
from dynlora.lora.plain import plain_lora
from small_net import TARGETS, adamw, adapted, allocated, attached, data, small_net, train


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)


def lora(**fields):
    return get_peft_model(small_net(), LoraConfig(target_modules=TARGETS, **fields))


# -- wrong use -----------------------------------------------------------------------------------


def test_a_model_without_an_adapter_is_refused():
    net = small_net()
    with pytest.raises(ValueError, match=r"SmallNet has no LoRA adapter .*Wrap it with get_peft"):
        RankAllocator(net, adamw(net), total_steps=5, target_r=2)


def test_an_adapter_that_is_not_trainable_is_refused():
    model = adapted()
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="adapter='default' is not trainable"):
        RankAllocator(model, optimizer, total_steps=5, target_r=2)


@pytest.mark.parametrize("gated", [False, True])
def test_the_number_of_steps_comes_from_the_call_or_the_settings(gated):
    model = adapted(gated=gated)
    with pytest.raises(ValueError, match=r"total_steps is unknown.*Pass RankAllocator"):
        allocated(model, adamw(model), total_steps=None, gated=gated)
    model = adapted(gated=gated, **({"total_steps": 9} if gated else {}))
    settings = {} if gated else {"target_r": 2, "total_steps": 9}
    assert RankAllocator(model, adamw(model), **settings).total_steps == 9


def test_two_different_numbers_of_steps_are_refused():
    model = adapted(gated=True, total_steps=9)
    with pytest.raises(ValueError, match="total_steps=8 differs from the total_steps=9"):
        RankAllocator(model, adamw(model), total_steps=8)


def test_a_target_is_needed_beside_a_stock_config_and_must_not_be_given_beside_a_gated_one():
    with pytest.raises(
        ValueError, match="target_r is missing: .* the mean rank per adapted module"
    ):
        RankAllocator(model := adapted(), adamw(model), total_steps=5)
    model = adapted(gated=True)
    with pytest.raises(ValueError, match="target_r=2 must not be given beside a DynLoraConfig"):
        RankAllocator(model, adamw(model), total_steps=5, target_r=2)


def test_a_setting_that_is_unknown_is_refused():
    with pytest.raises(TypeError, match="no argument 'tarqet_r'. Did you mean target_r"):
        RankAllocator(model := adapted(), adamw(model), total_steps=5, tarqet_r=2)


@pytest.mark.parametrize("gated", [False, True])
def test_a_target_above_the_start_is_refused(gated):
    with pytest.raises(
        ValueError, match="target_r=4 asks for 136 parameters, but .* start with 97"
    ):
        attached(gated=gated, target_r=4, rank_pattern={"0": 1})


@pytest.mark.parametrize("gated", [False, True])
def test_a_target_below_one_component_is_refused(gated):
    with pytest.raises(
        ValueError,
        match="target_r=0.37 asks for 12 parameters.*one component of .*layers.0.* has 13",
    ):
        attached(gated=gated, target_r=0.37)
    attached(gated=gated, target_r=0.37, budget="components")


def test_stepping_past_total_steps_is_refused():
    model, optimizer, _ = attached(total_steps=7)
    train(model, optimizer, 7)
    with pytest.raises(RuntimeError, match="step beyond total_steps=7"):
        train(model, optimizer, 1)


def test_an_optimizer_without_the_adapter_is_refused():
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="SGD does not hold the adapter parameters of module 'layers.0'"
    ):
        allocated(adapted(), other)


def test_an_optimizer_without_step_hooks_is_refused():
    with pytest.raises(TypeError, match="optimizer=str must be a torch.optim.Optimizer"):
        allocated(adapted(), "adamw")


def test_an_allocator_that_never_saw_a_step_cannot_be_finalized():
    _, _, allocator = attached()
    for call in (allocator.finalize_, allocator.freeze_):
        with pytest.raises(RuntimeError, match="never saw an optimizer step"):
            call()


@pytest.mark.parametrize("gated", [False, True])
def test_an_allocator_on_another_optimizer_fails_at_the_first_step(gated):
    model, _, allocator = attached(gated=gated)
    with pytest.raises(
        RuntimeError, match=r"stepped by an optimizer \(SGD\) that its RankAllocator"
    ):
        train(model, sgd(model), 1)
    assert allocator.step == 0


def test_gates_without_an_allocator_fail_at_the_first_step():
    model = adapted(gated=True)
    with pytest.raises(RuntimeError, match="'default' is being trained without a RankAllocator"):
        train(model, adamw(model), 1)


def test_a_stock_lora_without_an_allocator_and_gates_without_a_cut_just_train():
    for model in (adapted(), adapted(gated=True, r=2)):
        losses = train(model, adamw(model), 20)
        assert losses[-1] < losses[0]


def test_a_forgotten_model_no_longer_waits_for_its_allocator():
    attached()
    adapted(gated=True)
    gc.collect()
    other = small_net()
    train(other, adamw(other), 1)


def test_a_second_allocator_takes_over_once_the_first_is_detached():
    model, optimizer, first = attached()
    with pytest.raises(ValueError, match=r"detach\(\) the first"):
        allocated(model, optimizer, total_steps=20)
    first.detach()
    second = allocated(model, optimizer, total_steps=20)
    train(model, optimizer, 20)
    assert (first.step, second.step) == (0, 20)


def test_a_new_optimizer_takes_a_new_allocator_while_the_old_one_is_alive():
    model, _, first = attached()
    optimizer = adamw(model)
    second = allocated(model, optimizer, total_steps=20)
    train(model, optimizer, 20)
    assert (first.step, second.step) == (0, 20)


def test_finalizing_untrained_gates_is_refused_and_changes_nothing():
    model = adapted(gated=True, preset="paper")
    with pytest.raises(ValueError, match="no live component: every gate is 0"):
        finalize_(model)
    assert isinstance(model.peft_config["default"], DynLoraConfig)


def test_a_wrong_adapter_name_is_refused():
    for call in (lambda m: finalize_(m, "other"), lambda m: dem_loss(m, "other")):
        with pytest.raises(ValueError, match=r"adapter='other' must name one of .*\['default'\]"):
            call(adapted())


VARIANTS = [
    {"use_dora": True},
    {"use_qalora": True, "qalora_group_size": 1},
    {"layer_replication": [(0, 1)]},
    {"ensure_weight_tying": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_lora_variants_without_components_are_refused(fields):
    model = lora()
    for name, value in fields.items():
        setattr(model.peft_config["default"], name, value)
    name = next(iter(fields))
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be combined with rank allocation: .*"):
        allocated(model, adamw(model))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_grouped_convolution_is_refused():
    net = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    model = get_peft_model(net, LoraConfig(target_modules=["0"], r=4))
    with pytest.raises(ValueError, match="module '0' is a convolution with groups=2.*exclude_mod"):
        allocated(model, adamw(model))


def test_biases_that_peft_would_not_save_are_refused(monkeypatch):
    """peft 0.20 looks for the bias of a module beside its base layer, where it is not."""
    model = lora(bias="lora_only")
    monkeypatch.setattr("dynlora.lora.configs.version", lambda _: "0.20.0")
    with pytest.raises(
        ValueError, match=r"bias='lora_only' needs peft 0.21 .*: peft 0.20.0 trains"
    ):
        allocated(model, adamw(model))
    with pytest.raises(ValueError, match=r"bias='lora_only' needs peft 0.21"):
        plain_lora(model, "default")
    allocated(kept := lora(bias="all"), adamw(kept))
    monkeypatch.setattr("dynlora.lora.configs.version", lambda _: "0.21.0")
    allocated(model, adamw(model))


# -- scores --------------------------------------------------------------------------------------


def by_size(modules, _step):
    for module in modules:
        module.ema.copy_(module.probes[0].parameter.detach().square().sum(0))


def test_components_are_ranked_by_a_function_of_ones_own():
    model, optimizer, allocator = attached(
        score=lambda ms, _: [m.ema.fill_(1) for m in ms] and None
    )
    train(model, optimizer, 40)
    assert allocator.ranks() == {"layers.0": 0, "layers.1": 2, "layers.2": 4}  # the cheapest first
    assert allocator.plan()["importance"] == "own"


def test_the_name_of_an_importance_is_no_score():
    with pytest.raises(TypeError, match=r"score='norm' must be a function .* importance='norm'"):
        attached(score="norm")


def test_scores_that_are_returned_instead_of_written_are_refused_at_the_first_step():
    model, optimizer, allocator = attached(score=lambda modules, _: [m.ema for m in modules])
    with pytest.raises(TypeError, match="score must return None, not list"):
        train(model, optimizer, 1)
    assert allocator.history == []


def test_scores_that_were_never_written_prune_nothing():
    model, optimizer, allocator = attached(score=lambda *_: None)
    with pytest.raises(ValueError, match=r"all scores are 0 after 16 steps.* wrote into no module"):
        train(model, optimizer, 20)
    assert all(bool(m.live.all()) for m in allocator.modules)


def test_scores_that_are_all_below_0_keep_nothing_and_are_refused():
    def score(modules, _step):
        for module in modules:
            module.ema.fill_(-2.0)

    model, optimizer, allocator = attached(score=score)
    with pytest.raises(ValueError, match="at step 16: scores must be 0 or more"):
        train(model, optimizer, 20)
    assert all(bool(m.live.all()) for m in allocator.modules)


@pytest.mark.parametrize("gated", [False, True])
def test_sensitivities_that_are_all_0_are_refused(gated):
    """Gradients are gone before the step: modules would be kept in their order in the model."""
    model, optimizer, allocator = attached(gated=gated)
    x, y = data()

    def step():
        ((model(x) - y) ** 2).mean().backward()
        optimizer.zero_grad()
        optimizer.step()

    for _ in range(15):
        step()
    with pytest.raises(ValueError, match="all scores are 0 after 16 steps.* have no gradient"):
        step()
    assert all(bool(m.live.all()) for m in allocator.modules)


def test_a_first_pruning_at_the_first_steps_says_that_nothing_has_been_learnt():
    model, optimizer, _ = attached(total_steps=2)
    with pytest.warns(UserWarning, match="pruned at step 1, before any has learned"):
        train(model, optimizer, 2)


def test_a_nan_of_the_users_score_is_not_blamed_on_the_weights():
    def score(modules, step):
        by_size(modules, step)
        modules[1].ema[0] = torch.nan

    model, optimizer, _ = attached(score=score)
    with pytest.raises(NotFiniteError, match="in module 'layers.1' .* from your score function"):
        train(model, optimizer, 20)


# -- NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_bad_gradient_stops_the_step_before_it_does_harm(kind, bad, gated):
    model, optimizer, allocator = attached(total_steps=16, prune_interval=2, gated=gated)
    train(model, optimizer, 2)
    model(data()[0]).sum().backward()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    allocator.modules[1].factors[kind].parameter.grad.view(-1)[0] = bad
    with pytest.raises(
        NotFiniteError,
        match=r"gradient at step 3 in module 'layers.1' \(modules with such gradients: 1\)",
    ):
        optimizer.step()
    assert allocator.step == 2
    after = (model.state_dict(), optimizer.state_dict()["state"])
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    optimizer.zero_grad()
    train(model, optimizer, 14)  # the run can go on
    assert allocator.is_frozen


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("importance", ["share", "sensitivity"])
def test_bad_weights_prune_nothing_and_are_not_finalized(importance, gated):
    model, optimizer, allocator = attached(gated=gated, importance=importance, prune_interval=14)
    train(model, optimizer, 19)
    with torch.no_grad():
        allocator.modules[1].factors[1].parameter.view(-1)[0] = float("nan")
    with pytest.raises(NotFiniteError, match="gradient at step 20 in module 'layers.0' .*: 3"):
        train(model, optimizer, 1)
    assert all(bool(m.live.all()) for m in allocator.modules)
    assert allocator.history == []
    with pytest.raises(NotFiniteError, match=r"weights of module 'layers.1' \(.*: 1\)"):
        allocator.finalize_()


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """Where reading a number would wait for the device."""
    for module in ("allocator", "checks"):
        monkeypatch.setattr(f"dynlora.allocator.{module}.reading_is_free", lambda _modules: False)


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("at", [3, 10, 25])  # before the window, inside it, after the freeze
def test_on_an_accelerator_a_bad_gradient_is_named_before_anything_is_pruned_or_finalized(
    at, gated
):
    model, optimizer, allocator = attached(gated=gated, prune_interval=3, target_r=0.5)
    train(model, optimizer, at)
    ranks = allocator.ranks()
    loss = model(data()[0]).sum() * float("nan")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # the finding stays on the device
    for _ in range(2):  # the flag is kept, and a good gradient does not clear it
        with pytest.raises(NotFiniteError, match=rf"in the adapter at or before step {at + 1}"):
            allocator.check_finite()
    with pytest.raises(NotFiniteError, match="nothing is pruned, saved or finalized"):
        allocator.finalize_()
    if at < 20:
        with pytest.raises(NotFiniteError, match="at or before step"):
            allocator.freeze_()
        with pytest.raises(NotFiniteError, match="at or before step"):
            train(model, optimizer, 20 - at)
    assert allocator.ranks() == ranks


@pytest.mark.usefixtures("on_an_accelerator")
def test_on_an_accelerator_a_step_that_a_scaler_skips_is_not_held_against_the_run():
    model, optimizer, allocator = attached(optimizer=lambda m: adamw(m, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        loss = model(data()[0]).sum() * (float("inf") if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    allocator.check_finite()
    assert allocator.step == 3


def test_modules_of_several_devices_and_dtypes_are_watched_device_by_device(monkeypatch):
    monkeypatch.setattr("dynlora.allocator.checks.reading_is_free", lambda _modules: False)
    model = adapted()
    modules = find_components(model, "default")
    model.get_base_model().layers[1].to(torch.bfloat16)
    model.get_base_model().layers[2].to("meta")
    for module in modules:
        for factor in module.factors:
            factor.parameter.grad = torch.ones_like(factor.parameter)
    guard = FiniteGuard()
    guard.look(modules, step=1)
    assert {d.type for d in guard._bad} == {"cpu", "meta"}
    modules[0].factors[0].parameter.grad[0] = torch.nan
    guard.look(modules, step=2)
    assert bool(guard._bad[torch.device("cpu")])


def test_scores_that_lie_on_several_devices_are_ranked_together(monkeypatch):
    """A second device is played by tensors that refuse to meet those of the first."""
    model, optimizer, allocator = attached(prune_interval=3, target_r=0.5)
    expected, plain, _ = attached(prune_interval=3, target_r=0.5)
    losses = train(expected, plain, 40)
    monkeypatch.setattr(torch, "cat", refusing_a_mix(torch.cat))
    far = allocator.modules[2]
    far.ema, far.live = (t.as_subclass(Far) for t in (far.ema, far.live))
    assert train(model, optimizer, 40) == losses
    assert 0 in allocator.ranks().values()


class Far(torch.Tensor):
    """A tensor that says it is elsewhere, and comes to the CPU when asked."""

    device = torch.device("meta")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def refusing_a_mix(cat):
    def checked(tensors, *args, **kwargs):
        if len({t.device for t in tensors}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device")
        return cat(tensors, *args, **kwargs)

    return checked
