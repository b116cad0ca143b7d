"""A network small enough to check by hand: tanh layers, deterministic data."""

import itertools

import torch
from peft import get_peft_model
from torch import nn

from dynlora import DynLoraConfig, RankAllocator

PAPER = {"init": "kaiming", "importance": "share", "dem_weight": 0.1}


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


def adapted(seed=0, dtype=torch.float32, **fields):
    """The small net with a DynLora adapter on every layer; start, score and DEM are the paper's."""
    net = small_net(seed=seed).to(dtype)
    fields = {"init_r": 4, "target_r": 2, "target_modules": ["0", "1", "2"], **PAPER, **fields}
    return get_peft_model(net, DynLoraConfig(**fields))


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, **options)


def attached(total_steps=40, optimizer=adamw, **fields):
    """Model, optimizer and allocator, ready to train."""
    model = adapted(**fields)
    built = optimizer(model)
    return model, built, RankAllocator(model, built, total_steps=total_steps)


def train(model, optimizer, steps, *, dtype=torch.float32):
    """Plain training on the fixed data; returns the losses."""
    x, y = (t.to(dtype) for t in data())
    losses = []
    for _ in range(steps):
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
