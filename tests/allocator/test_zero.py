"""DeepSpeed ZeRO, of which a stand-in runs in this process: what one process trains, and masks."""

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

import small_net
import zero_stand_in
from dynlora import export_lora
from dynlora.allocator.step_hooks import steppable
from dynlora.lora.sharding import (
    add_gradient_,
    full_gradient,
    full_shape,
    full_tensor,
    scale_all_,
    unwrap_engine,
)

RUN = {"target_r": 0.5, "dem_weight": 0.2}  # modules end at rank 0
STEPS = 30


@pytest.fixture(autouse=True)
def _deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", zero_stand_in.DEEPSPEED)


def alone(importance):
    model, optimizer, allocator = small_net.attached(
        total_steps=STEPS, importance=importance, **RUN
    )
    return small_net.train(model, optimizer, STEPS), allocator


@pytest.mark.parametrize("scale", [1.0, 1024.0], ids=["fp32", "scaled losses"])
@pytest.mark.parametrize("importance", ["share", "sensitivity"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_masks_and_exports_what_a_plain_one_trains(tmp_path, stage, importance, scale):
    engine, optimizer, allocator = zero_stand_in.attached(
        stage, scale=scale, importance=importance, **RUN
    )
    losses = zero_stand_in.train(engine, optimizer, STEPS)
    expected, plain = alone(importance)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert allocator.ranks() == plain.ranks()
    assert 0 in allocator.ranks().values()
    assert [m.rank for m in allocator.modules] == [4, 4, 4]  # masked, in their old shapes
    for module in allocator.modules:
        b, dead = module.probes[0].parameter, ~module.live
        assert not full_tensor(b)[:, dead].any()
        assert not zero_stand_in.safe_get_full_fp32_param(b)[:, dead].any()
    allocator.detach()
    export_lora(engine, tmp_path)
    x, _ = small_net.data()
    with zero_stand_in.GatheredParameters(optimizer.parameters):
        logits = engine(x)
    loaded = PeftModel.from_pretrained(small_net.small_net(), tmp_path)
    torch.testing.assert_close(loaded(x), logits, rtol=0, atol=1e-6)


def test_a_step_that_the_optimizer_skips_for_an_overflow_is_no_step_of_the_run():
    engine, optimizer, allocator = zero_stand_in.attached(2, scale=1024.0, **RUN)
    losses = zero_stand_in.train(engine, optimizer, 3, spoil=1)
    assert (optimizer.overflow, allocator.step) == (False, 2)
    assert losses[2] == losses[1] < losses[0]


def test_a_bad_gradient_without_a_scale_stops_the_run_before_its_step():
    engine, optimizer, allocator = zero_stand_in.attached(3, **RUN)
    with pytest.raises(FloatingPointError, match="NaN or infinite gradient at step 2 in module"):
        zero_stand_in.train(engine, optimizer, 3, spoil=1)
    assert allocator.step == 1


def test_a_detached_allocator_gives_the_optimizer_its_own_step_back():
    engine, optimizer, allocator = zero_stand_in.attached(2, **RUN)
    zero_stand_in.train(engine, optimizer, 1)
    allocator.detach()
    zero_stand_in.train(engine, optimizer, 1)
    assert allocator.step == 1
    assert "step" not in vars(optimizer)


def test_the_optimizer_is_found_in_a_wrapper_and_the_model_in_its_engine():
    model = small_net.adapted()
    optimizer = zero_stand_in.Zero(model, stage=2)
    assert steppable(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) is optimizer
    torch_optimizer = small_net.adamw(model)
    assert steppable(torch_optimizer) is torch_optimizer
    assert unwrap_engine(zero_stand_in.DeepSpeedEngine(model)) is model
    assert unwrap_engine(model) is model


@pytest.mark.parametrize("stage", [2, 3])
def test_whole_parameters_are_read_and_scaled_wherever_their_parts_are(stage):
    model = small_net.adapted()
    expected = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    zero_stand_in.Zero(model, stage=stage)
    spread = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n: full_shape(p) for n, p in spread.items()} == {
        n: t.shape for n, t in expected.items()
    }
    assert all(torch.equal(full_tensor(p), expected[n]) for n, p in spread.items())
    plain = torch.tensor([3.0, 5.0])
    factors = [torch.full_like(expected[n], 0.5) for n in spread]
    scale_all_([plain, *spread.values()], [torch.tensor([2.0, 0.0]), *factors])
    assert plain.tolist() == [6.0, 0.0]
    for name, parameter in spread.items():
        assert torch.equal(full_tensor(parameter), expected[name] / 2)
        exact = zero_stand_in.safe_get_full_fp32_param(parameter)
        assert torch.equal(exact, expected[name] / 2)


def test_a_gradient_is_added_to_the_present_one_or_is_the_first():
    parameter = next(p for p in small_net.adapted().parameters() if p.requires_grad)
    zero_stand_in.Zero(SimpleNamespace(parameters=lambda: [parameter]), stage=3)
    assert full_gradient(parameter) is None
    ones = torch.ones(full_shape(parameter))
    for total in (1.0, 2.0):
        add_gradient_(parameter, ones)
        assert torch.equal(full_gradient(parameter), total * ones)
