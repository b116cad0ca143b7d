"""A network small enough to check by hand: tanh layers, deterministic data.

The adapter on it is a stock LoRA with an allocator of the shipped defaults, or with ``gated=True`` the
paper's parametrisation; fields of either kind go where they belong.
"""

import dataclasses
import itertools

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import DynLoraConfig, RankAllocator
from dynlora.allocation import Settings

TARGETS = ["0", "1", "2"]
SETTINGS = {field.name for field in dataclasses.fields(Settings)} | {"preset"}


class SmallNet(nn.Module):
    """Linear layers of chosen widths with tanh between them; named ``layers.0``, ``layers.1``, …"""

    def __init__(self, widths=(6, 7, 5, 4)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def small_net(widths=(6, 7, 5, 4), seed=0):
    torch.manual_seed(seed)
    return SmallNet(widths)


def data(seed=1, rows=32, width=6, outputs=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return x, torch.tanh(x @ torch.randn(width, outputs, generator=generator))


def configured(*, gated=False, **fields):
    """A config, and the settings that go to the allocator beside it; r, or init_r, is 4, target_r 2."""
    fields = {"target_r": 2, "target_modules": TARGETS, "lora_alpha": 8, **fields}
    if gated:
        fields.setdefault("init_r", fields.pop("r", 4))
        return DynLoraConfig(**fields), {}
    settings = {name: fields.pop(name) for name in SETTINGS & fields.keys()}
    return LoraConfig(**{"r": 4, **fields}), settings


def adapted(seed=0, dtype=torch.float32, widths=(6, 7, 5, 4), **fields):
    """The small net with an adapter on every layer; settings of an allocator are left out."""
    config, _ = configured(**fields)
    return get_peft_model(small_net(widths, seed).to(dtype), config)


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, **options)


def allocated(model, optimizer, *, total_steps=40, score=None, **fields):
    """An allocator for a model of ``adapted(**fields)``."""
    for name in ("seed", "dtype", "widths"):
        fields.pop(name, None)
    _, settings = configured(**fields)
    return RankAllocator(model, optimizer, total_steps=total_steps, score=score, **settings)


def attached(total_steps=40, optimizer=adamw, score=None, **fields):
    """Model, optimizer and allocator, ready to train."""
    model = adapted(**fields)
    built = optimizer(model)
    return model, built, allocated(model, built, total_steps=total_steps, score=score, **fields)


def train(model, optimizer, steps, *, dtype=torch.float32):
    """Plain training on the fixed data; returns the losses."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    width, outputs = layers[0].in_features, layers[-1].out_features
    x, y = (t.to(dtype) for t in data(width=width, outputs=outputs))
    losses = []
    for _ in range(steps):
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
