"""Optimizers that split the adapter's parameters: Muon, chains of optimizers, LoRA+."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from dynlora import RankAllocator

STEPS = 20


class Chained(torch.optim.Optimizer):
    """Several optimizers in one, as those who offer Muon beside AdamW have it."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], {})
        self.param_groups = [g for part in parts for g in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)


def adapted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6))
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def chained(model):
    matrices, others = trained(model)[::2], trained(model)[1::2]
    return Chained(torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2))


def loraplus(model):
    adamw = torch.optim.AdamW
    return create_loraplus_optimizer(model, optimizer_cls=adamw, lr=1e-2, loraplus_lr_ratio=4)


def run(model, optimizer):
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, target_r=1, prune_interval=2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    return allocator


@pytest.mark.parametrize(
    "build", [lambda m: torch.optim.Muon(trained(m), lr=1e-2), chained, loraplus]
)
def test_it_trains_to_the_budget_and_the_adapter_shrinks_at_the_freeze(build):
    model = adapted()
    before = sum(p.numel() for p in trained(model))
    allocator = run(model, build(model))
    assert sum(p.numel() for p in trained(model)) <= before // 4
    assert all(bool(m.live.all()) for m in allocator.present)
