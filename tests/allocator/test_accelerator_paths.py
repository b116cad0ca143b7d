"""What an allocator does differently on an accelerator, with the device's answers stood in for."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import RankAllocator
from dynlora.allocator import checks
from dynlora.errors import NotFiniteError


@pytest.fixture
def run():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, RankAllocator(model, optimizer, target_r=1, total_steps=100)


def backward(model):
    model(torch.ones(2, 6)).square().sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_stays_unread_until_the_run_waits_anyway_and_is_then_refused(
    run, monkeypatch, bad
):
    model, optimizer, allocator = run
    monkeypatch.setattr(checks, "reading_is_free", lambda _: False)
    for step in range(3):
        backward(model)
        if step == 1:
            allocator.modules[0].factors[0].parameter.grad[0, 0] = bad
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            allocator.check_finite()
    with pytest.raises(NotFiniteError, match="at or before step 3"):
        allocator.check_finite()
    with pytest.raises(NotFiniteError, match="at or before step 3"):
        allocator.freeze_()
    assert not allocator.history


def test_a_step_inside_a_captured_graph_is_refused_for_its_replays_would_go_unseen(
    run, monkeypatch
):
    model, optimizer, allocator = run
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backward(model)
    with pytest.raises(RuntimeError, match="Capture forward and backward pass only"):
        optimizer.step()
    assert allocator.step == 0
    monkeypatch.undo()
    optimizer.step()
    assert allocator.step == 1
