"""Until the first pruning the run is the one without an allocator, bit for bit."""

import pytest
import torch
from torch import nn

from small_net import adamw, adapted, allocated, attached, data, train

STEPS = 19  # the window begins at step 6; the first pruning would come after step 20


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


def adafactor(model):
    return torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": lambda m: adamw(m, foreach=False),
    "adamw foreach": lambda m: adamw(m, foreach=True),
    "adamw fused": lambda m: adamw(m, fused=True),
    "adafactor": adafactor,
}


def run(build, *, is_allocated, micro_batches=1, clip=None, autocast=False, **fields):
    torch.manual_seed(0)
    model = adapted(lora_dropout=0.1, **fields)
    optimizer = build(model)
    if is_allocated:
        allocated(model, optimizer, prune_interval=14, **fields)
    x, y = data()
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rows in torch.arange(len(x)).chunk(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = ((model(x[rows]) - y[rows]) ** 2).mean() / micro_batches
            loss.backward()
            seen.append(loss.item())
        if clip:
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        model.eval()
        seen.append(model(x).sum().item())
        model.train()
    return seen, model.state_dict(), optimizer.state_dict()


def assert_equal(one, two):
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][k], two[1][k]) for k in one[1])
    torch.testing.assert_close(one[2], two[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("importance", ["sensitivity", "share", "norm"])
def test_losses_weights_and_optimizer_state_are_those_of_the_run_without(name, importance):
    build = OPTIMIZERS[name]
    with_one = run(build, is_allocated=True, importance=importance)
    assert_equal(run(build, is_allocated=False, importance=importance), with_one)


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batches": 4, "clip": 0.05},
        {"autocast": True},
        {"use_rslora": True, "init_lora_weights": "gaussian"},
        {"lora_bias": True, "target_r": 1},
        {"dem_weight": 0.0, "revival": True, "budget": "components"},
    ],
    ids=str,
)
def test_so_are_they_with(fields):
    both = [run(OPTIMIZERS["adamw"], is_allocated=flag, **fields) for flag in (False, True)]
    assert_equal(*both)


def test_from_the_first_cut_on_it_is_another_run():
    """So that the comparison above can fail."""
    losses = []
    for interval in (14, 13):
        model, optimizer, _ = attached(prune_interval=interval)
        losses.append(train(model, optimizer, STEPS + 1))
    assert losses[0][:STEPS] == losses[1][:STEPS]
    assert losses[0][STEPS] != losses[1][STEPS]
