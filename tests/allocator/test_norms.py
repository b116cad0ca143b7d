"""Norms and shares are computed for many modules at once; each must be what it is alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import DynLoraConfig
from dynlora.allocator.scores import norms
from dynlora.lora.components import find_components


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("embed", nn.Embedding(11, 6))
        self.mixed = nn.MultiheadAttention(6, 2)
        self.wide = nn.Linear(6, 9)
        self.same = nn.Linear(6, 9)
        self.low = nn.Linear(9, 4)
        self.conv = nn.Conv1d(4, 5, 3)


def components(gated):
    torch.manual_seed(0)
    names = ["embed", "wide", "same", "low", "conv"]
    shared = {"target_modules": names, "rank_pattern": {"low": 2}}
    config = (
        DynLoraConfig(init_r=3, target_r=2, target_modules=["wide", "same", "low"])
        if gated
        else LoraConfig(r=3, **{**shared, "target_modules": [*names, "mixed"]})
    )
    found = find_components(get_peft_model(Net(), config), "default")
    for module in found:
        for factor in module.factors:
            nn.init.normal_(factor.parameter)
        if module.gate is not None:
            nn.init.normal_(module.gate)
    return found


def updates(module):
    """Each component's update, flattened over all pairs: (rank, entries)."""
    parts = []
    for a, b in module.pairs:
        rows, columns = (f.vectors(f.parameter.detach()).squeeze(0) for f in (a, b))
        parts.append((columns[:, :, None] * rows[:, None, :]).flatten(1))
    whole = torch.cat(parts, 1)
    return whole if module.gate is None else module.gate.detach()[:, None] * whole


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("importance", ["norm", "share"])
def test_scores_of_many_modules_are_those_of_the_update_of_each(gated, importance):
    modules = components(gated)
    assert len(modules) == (3 if gated else 6)
    for module, score in zip(modules, norms(modules, importance), strict=True):
        each = updates(module)
        expected = each.norm(dim=1)
        expected = (
            expected * module.scaling
            if importance == "norm"
            else expected / (each.sum(0).norm() + 1e-12)
        )
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)
