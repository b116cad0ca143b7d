"""The fast path equals the slow, literal reference, state included, over a whole run."""

import itertools

import pytest
import torch

import reference
from dynlora import dem_loss
from small_net import adamw, attached, data

KINDS = ("sensitivity", "share", "norm")
STOCK = [
    {"importance": kind, "compact": compact, "target_r": target}
    for kind, compact, target in itertools.product(KINDS, (False, True), (2, 0.5))
]
PAPER = [
    {"gated": True, "preset": "paper", "lora_dropout": 0.0, "compact": compact, "init_std": std}
    for compact, std in itertools.product((False, True), (None, 0.2))
]
OTHERS = [
    {"revival": True},
    {"dem_weight": 0.3, "importance": "share"},
    {"gated": True, "compact": False},
    {"budget": "components", "target_r": 0.5},
    {"gated": True, "target_r": 0.5},
]


def twins(**fields):
    """The same start twice: the package in float64 and the reference."""
    model, optimizer, allocator = attached(
        total_steps=60, prune_interval=4, dtype=torch.float64,
        optimizer=lambda m: adamw(m, lr=2e-2), **fields,
    )  # fmt: skip
    modules = []
    for module in allocator.modules:
        parts = [f.parameter.detach().clone().requires_grad_() for f in module.factors]
        base = module.layer.get_base_layer()
        modules.append(
            reference.Module(
                base.weight.data, base.bias.data, *parts[:2], (*parts, None)[2], module.scaling
            )
        )
    settings = allocator.settings
    counts = settings.budget == "components"
    costs = [1 if counts else sum(m.weight.shape) for m in modules]
    target = max(1, int(settings.target_r * sum(costs) + (0.5 if counts else 0)))
    run = reference.Run(
        modules, total_steps=60, costs=costs, target=target, lr=2e-2, beta=0.9,
        eta=settings.dem_weight, interval=4, window=(0.15, 0.5), kind=settings.importance,
        revival=settings.revival,
    )  # fmt: skip
    return model, optimizer, allocator, run


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def assert_same_state(allocator, run, *, compacted):
    for module, slow in zip(allocator.modules, run.modules, strict=True):
        live = torch.tensor(slow.live)
        if compacted:
            assert module.rank == int(live.sum())
            assert module.is_dropped == (int(live.sum()) == 0)
        else:
            assert module.live.tolist() == slow.live
            live = torch.ones_like(live)
        if module.is_dropped:
            continue
        for factor, exact in zip(module.factors, slow.parameters, strict=True):
            places = live.nonzero().flatten()
            equal(factor.parameter.detach(), exact.detach().index_select(factor.dim, places))
        ema = torch.tensor(slow.ema, dtype=torch.float32)[live]
        torch.testing.assert_close(module.ema.float(), ema, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [*STOCK, *PAPER, *OTHERS], ids=lambda f: str(f)[1:-1])
def test_sixty_steps_equal_the_reference(fields):
    model, optimizer, allocator, run = twins(**fields)
    x, y = (t.double() for t in data())
    costs = []
    for _ in range(60):
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(run.step(x, y), rel=1e-9)
        assert allocator.budget == run.budget()
        assert allocator.is_frozen == run.frozen
        compacted = allocator.settings.compact and allocator.is_frozen
        assert_same_state(allocator, run, compacted=compacted)
        costs.append(allocator.cost)
    assert costs[8] == run.total  # nothing is pruned before t0
    assert run.target < costs[25] < run.total  # inside the window
    assert costs[29:] == [costs[29]] * 31
    assert costs[29] <= run.target
    if allocator.settings.target_r == 0.5:
        assert 0 in allocator.ranks().values()


@pytest.mark.parametrize("gated", [False, True])
def test_dem_loss_equals_the_reference(gated):
    model, _, _, run = twins(gated=gated)
    equal(dem_loss(model), reference.dem(run.modules))
