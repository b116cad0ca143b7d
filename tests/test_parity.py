"""The fast path equals the slow, literal reference, state included, over a whole run."""

import pytest
import torch

import reference
from dynlora import RankAllocator, dem_loss
from small_net import adamw, adapted, data

SETTINGS = {"prune_start": 0.15, "prune_end": 0.5, "prune_interval": 4}


def twins(*, compact, init_std):
    """The same start twice: the package in float64 and the reference."""
    model = adapted(
        init_r=4, target_r=2, dem_weight=0.3, compact=compact, init_std=init_std,
        dtype=torch.float64, **SETTINGS,
    )  # fmt: skip
    optimizer = adamw(model, lr=2e-2)
    allocator = RankAllocator(model, optimizer, total_steps=60)
    modules = []
    for gated in allocator.layers:
        a, b, c = (p.detach().clone().requires_grad_() for p in gated.parameters)
        base = gated.layer.get_base_layer()
        modules.append(reference.Module(base.weight.data, base.bias.data, a, b, c, gated.scaling))
    run = reference.Run(
        modules,
        total_steps=60,
        target=6,
        lr=2e-2,
        beta=0.9,
        eta=0.3,
        interval=4,
        window=(0.15, 0.5),
    )
    return model, optimizer, allocator, run


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def assert_same_state(allocator, run, *, compacted):
    for gated, module in zip(allocator.layers, run.modules, strict=True):
        live = torch.tensor(module.live)
        if compacted:
            assert gated.num_components == int(live.sum())
            assert gated.is_dropped == (int(live.sum()) == 0)
        else:
            assert gated.live.tolist() == module.live
            live = torch.ones_like(live)
        if gated.is_dropped:
            continue
        a, b, c = (p.detach() for p in gated.parameters)
        equal(a, module.a.detach()[live])
        equal(b, module.b.detach()[:, live])
        equal(c, module.c.detach()[live])
        ema = torch.tensor(module.ema, dtype=torch.float32)[live]
        torch.testing.assert_close(gated.ema.float(), ema, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init_std", [None, 0.2])
@pytest.mark.parametrize("compact", [False, True])
def test_sixty_steps_equal_the_reference(compact, init_std):
    model, optimizer, allocator, run = twins(compact=compact, init_std=init_std)
    x, y = (t.double() for t in data())
    live_counts = []
    for _step in range(1, 61):
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(run.step(x, y), rel=1e-9)
        assert allocator.budget == run.budget()
        assert allocator.is_frozen == run.frozen
        assert_same_state(allocator, run, compacted=compact and allocator.is_frozen)
        live_counts.append(sum(allocator.ranks().values()))
    assert live_counts[8] == 12  # nothing is pruned before t0
    assert 6 < live_counts[25] < 12  # inside the window
    assert set(live_counts[29:]) == {6}  # the budget, exactly, from t1 on


def test_dem_loss_equals_the_reference():
    model, _, _, run = twins(compact=False, init_std=None)
    equal(dem_loss(model), reference.dem(run.modules))
