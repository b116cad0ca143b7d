"""The ways to train that are compared, each as one function that makes one training step."""

from collections.abc import Callable
from typing import Any

import torch
from cases import StepCase
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import DynLoraConfig, RankAllocator

FOREVER = 10**9  # a schedule whose pruning window never opens while we measure

FLOOR = "floor: no adapter"
LORA_TARGET = "PEFT LoRA, target rank"
LORA_INITIAL = "PEFT LoRA, initial rank"
PLAIN_BEFORE = "dynlora, PEFT's path, before freeze"
FUSED_BEFORE = "dynlora, before freeze"
FUSED_AFTER = "dynlora, after freeze"


def open_gates_(model: nn.Module) -> nn.Module:
    """Random gates instead of 0, so that ranks at a freeze are ragged as in a real run."""
    draws = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(".c"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model


def dynamic(case: StepCase, device: str, *, fused: bool) -> tuple[nn.Module, Any, RankAllocator]:
    """Model, optimizer and allocator of a run at its start."""
    config = DynLoraConfig(
        init_r=case.init_r,
        target_r=case.target_r,
        target_modules=case.shape.targets,
        lora_dropout=case.dropout,
        fused=fused,
    )
    model = open_gates_(get_peft_model(_base(case, device), config))
    optimizer = adamw(model)
    return model, optimizer, RankAllocator(model, optimizer, total_steps=FOREVER)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of what is trained, at a rate that keeps weights where they are."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def _base(case: StepCase, device: str) -> nn.Module:
    return case.shape.build(case.layers, case.dtype, device)


def _plain(case: StepCase, device: str, rank: int) -> nn.Module:
    config = LoraConfig(
        r=rank, lora_alpha=8, target_modules=case.shape.targets, lora_dropout=case.dropout
    )
    return get_peft_model(_base(case, device), config)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, case: StepCase, device: str
) -> Callable[[], None]:
    """Forward, backward, optimizer step."""
    x = case.inputs(device)

    def step() -> None:
        model(inputs_embeds=x).last_hidden_state.square().mean().backward()
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def step_arms(case: StepCase, device: str) -> dict[str, Callable[[], None]]:
    """All arms of a comparison of training steps."""
    floor = _base(case, device).requires_grad_(False)
    arms = {FLOOR: training_step(floor, None, case, device)}
    for name, rank in ((LORA_TARGET, case.target_r), (LORA_INITIAL, case.init_r)):
        model = _plain(case, device, rank)
        arms[name] = training_step(model, adamw(model), case, device)
    for name, fused in ((PLAIN_BEFORE, False), (FUSED_BEFORE, True)):
        model, optimizer, _ = dynamic(case, device, fused=fused)
        arms[name] = training_step(model, optimizer, case, device)
    model, optimizer, allocator = dynamic(case, device, fused=True)
    step = training_step(model, optimizer, case, device)
    step()
    allocator.freeze_()
    return arms | {FUSED_AFTER: step}
