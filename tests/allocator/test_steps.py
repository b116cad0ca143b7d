"""Every optimizer step counts once: scalers, closures, wrappers, accumulation, errors inside a step."""

import pytest
import torch
from torch import nn

from dynlora import dem_loss
from small_net import adamw, adapted, attached, data, train


def parameters_of(allocator):
    return [f.parameter.detach() for m in allocator.present for f in m.factors]


def fused(model):
    return adamw(model, fused=True)


@pytest.mark.parametrize("gated", [False, True])
def test_skipped_steps_of_a_grad_scaler_do_not_count(gated):
    model, optimizer, allocator = attached(total_steps=12, gated=gated, target_r=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = data()
    for step in range(15):
        loss = ((model(x) - y) ** 2).mean() * (float("inf") if step in (0, 3, 4) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert allocator.step == 12
    assert allocator.is_frozen
    assert 0 in allocator.ranks().values()


def test_a_fused_optimizer_under_a_grad_scaler_gets_the_same_dem_and_skips_alike():
    results = []
    for build in (adamw, fused):
        model, optimizer, allocator = attached(total_steps=12, optimizer=build, dem_weight=2.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        x, y = data()
        for step in range(13):
            loss = ((model(x) - y) ** 2).mean() * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert allocator.step == 12
        results.append(parameters_of(allocator))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_closure_computes_the_gradients_that_are_read():
    results = []
    for use_closure in (False, True):
        model, optimizer, allocator = attached(total_steps=12, dem_weight=2.0)
        x, y = data()

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            return loss

        for _ in range(12):
            if use_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        results.append(parameters_of(allocator))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


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
        model, optimizer, allocator = attached(total_steps=12, optimizer=build, dem_weight=3.0)
        losses.append(train(model, optimizer, 12))
        assert allocator.step == 12
    assert losses[0] == losses[1]


def test_an_exception_inside_a_step_does_not_disturb_the_count():
    model, optimizer, allocator = attached(total_steps=12)
    train(model, optimizer, 2)
    held = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = "broken"
    with pytest.raises(TypeError):
        train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = held
    train(model, optimizer, 2)
    assert allocator.step == 4


def test_steps_are_optimizer_steps_not_micro_batches():
    model, optimizer, allocator = attached(total_steps=12)
    x, y = data()
    for micro in range(48):
        ((model(x) - y) ** 2).mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert allocator.step == 12
    assert allocator.is_frozen


def test_training_after_detach_scores_nothing():
    model, optimizer, allocator = attached()
    train(model, optimizer, 3)
    allocator.detach()
    train(model, optimizer, 3)
    assert allocator.step == 3


# -- DEM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_dem_gradient_is_autograds(accumulation, gated):
    """Task loss and DEM: task gradient + gradient of η·R, however many micro-batches."""
    fields = {"dem_weight": 0.3, "dtype": torch.float64, "gated": gated}
    model, optimizer, allocator = attached(**fields)
    fresh = adapted(**fields)
    x, y = (t.double() for t in data())
    for one in (model, fresh):
        draws = torch.Generator().manual_seed(4)
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=draws).double()
    for _ in range(accumulation):
        (((model(x) - y) ** 2).mean() / accumulation).backward()
    optimizer.step()
    (((fresh(x) - y) ** 2).mean() + 0.3 * dem_loss(fresh)).backward()
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)
    assert allocator.step == 1


def test_dem_is_added_after_gradient_clipping():
    """Like decoupled weight decay: a term in the gradient, not in the loss."""
    model, optimizer, allocator = attached(dem_weight=1000.0)
    model(data()[0]).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert allocator.modules[0].factors[0].parameter.grad.norm() > 1


def test_dem_stops_at_the_freeze():
    """As in the official code; the paper's Algorithm 1 never switches it off."""
    model, optimizer, allocator = attached(total_steps=12, dem_weight=5.0, compact=False)
    for step in range(1, 9):
        model(data()[0]).sum().backward()
        a = allocator.modules[0].factors[0].parameter
        task = a.grad.clone()
        optimizer.step()
        assert (not torch.equal(a.grad, task)) == (step <= 6)
        optimizer.zero_grad()
