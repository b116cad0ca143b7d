"""The ways to train that are compared, each as one function that makes one training step."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from cases import StepCase
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import RankAllocator
from dynlora.fused import fuse_

FOREVER = 10**9  # steps of a schedule whose pruning window never opens while we measure
MIDDLE = FOREVER * 325 // 1000  # of its window, where an eighth of what is to be cut still lives

FLOOR = "floor: no adapter"
LORA_TARGET = "PEFT LoRA, target rank"
LORA_INITIAL = "PEFT LoRA, initial rank"
BEFORE = "dynlora, before the first cut"
BEFORE_FUSED = "dynlora fused, before the first cut"
WINDOW = "dynlora, inside the window"
AFTER = "dynlora, after the freeze"
AFTER_FUSED = "dynlora fused, after the freeze"

PEERS = {BEFORE: LORA_INITIAL, BEFORE_FUSED: LORA_INITIAL, WINDOW: LORA_INITIAL}
"""The LoRA of an arm's own rank, where that is not the one of the target rank."""


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW of what is trained, by default at a rate that keeps weights where they are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **({"lr": 1e-6} | options))


def allocator_of(
    model: nn.Module, optimizer: Any, case: StepCase, **settings: Any
) -> RankAllocator:
    """An allocator that prunes in the middle of its window and at its end, if ever it gets there."""
    chosen = {
        "target_r": case.target_r,
        "total_steps": FOREVER,
        "prune_interval": FOREVER * 175 // 1000,
    }
    return RankAllocator(model, optimizer, **(chosen | settings))


def scatter_scores_(allocator: RankAllocator) -> None:
    """Random scores, so that ranks are ragged as in a real run; of every seventh module almost 0."""
    draws = torch.Generator().manual_seed(2)
    for i, module in enumerate(allocator.present):
        weight = 1e-6 if i % 7 == 5 else float(torch.rand((), generator=draws)) + 0.2
        module.ema.copy_(weight * torch.rand(module.rank, generator=draws))


def prune_in_the_middle_(allocator: RankAllocator, step: Callable[[], Any]) -> None:
    """Make a step that prunes, after which pruned components are held at 0."""
    step()
    scatter_scores_(allocator)
    allocator.step = MIDDLE - 1
    step()
    if not allocator.history:
        raise RuntimeError("the step in the middle of the window did not prune")


def freeze_ragged_(allocator: RankAllocator, step: Callable[[], Any]) -> None:
    """Freeze after a step, with ragged ranks, some of them 0."""
    step()
    freeze_(allocator)
    if 0 not in allocator.ranks().values():
        raise RuntimeError("no module fell to rank 0")


def freeze_(allocator: RankAllocator) -> None:
    """Freeze by random scores; the other arms' models in this process are no copies of this one."""
    scatter_scores_(allocator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* outside the model have the shapes")
        allocator.freeze_()


def quantise_(model: nn.Module, case: StepCase) -> nn.Module:
    """Put the targeted layers of a frozen model in 4 bit, by bitsandbytes, as QLoRA has them."""
    import bitsandbytes as bnb  # only here: a machine without it loses this case alone

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in case.shape.targets:
            small = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=layer.bias is not None,
                compute_dtype=case.dtype, quant_type="nf4",
            )  # fmt: skip
            small.load_state_dict(layer.state_dict())
            model.set_submodule(name, small.requires_grad_(False).to(layer.weight.device))
    vars(model).update(is_loaded_in_4bit=True)  # asked for by PEFT
    return model


def _base(case: StepCase, device: str) -> nn.Module:
    model = case.shape.build(case.layers, case.dtype, device)
    return quantise_(model.requires_grad_(False), case) if case.is_4bit else model


def _lora(case: StepCase, device: str, rank: int) -> nn.Module:
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
        model = _lora(case, device, rank)
        arms[name] = training_step(model, adamw(model), case, device)
    for name in (BEFORE, BEFORE_FUSED, WINDOW, AFTER, AFTER_FUSED):
        model = _lora(case, device, case.init_r)
        if name in {BEFORE_FUSED, AFTER_FUSED} and not fuse_(model):
            raise RuntimeError(f"{case.name}: no layer that the fused function serves")
        optimizer = adamw(model)
        allocator = allocator_of(model, optimizer, case)
        arms[name] = training_step(model, optimizer, case, device)
        if name == WINDOW:
            prune_in_the_middle_(allocator, arms[name])
        if name in {AFTER, AFTER_FUSED}:
            freeze_ragged_(allocator, arms[name])
    return arms
