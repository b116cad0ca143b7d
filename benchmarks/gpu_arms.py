"""What the GPU check compares. Everything that it knows of dynlora is in this file.

An arm is one function that makes a ``Training`` of a case and a fresh copy of its base model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from arms import (
    AFTER,
    AFTER_FUSED,
    BEFORE,
    BEFORE_FUSED,
    FLOOR,
    LORA_INITIAL,
    LORA_TARGET,
    WINDOW,
    adamw,
    allocator_of,
    freeze_ragged_,
    prune_in_the_middle_,
    quantise_,
)
from cases import LLAMA_1B, LLAMA_8B, Shape, StepCase
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dynlora.fused import fuse_


@dataclass(frozen=True)
class GpuCase(StepCase):
    """A case in bf16.

    Attributes:
        autocast: PEFT's default for a bf16 base: fp32 adapters, under autocast. Else all is bf16.
    """

    autocast: bool = False

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{super().name}, {'fp32 adapter in autocast' if self.autocast else 'bf16 adapter'}"


def gpu_case(
    shape: Shape,
    layers: int,
    rank: int,
    *,
    batch: int = 8,
    length: int = 512,
    dropout: float = 0.0,
    autocast: bool = False,
) -> GpuCase:
    """A case that starts at 1.5 times its target rank."""
    return GpuCase(
        shape, layers, batch, length, dropout, rank, rank * 3 // 2, torch.bfloat16, autocast
    )


def tiny(case: GpuCase) -> GpuCase:
    """The same case, small enough for a rehearsal on a CPU."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    if case.shape in (LLAMA_1B, LLAMA_8B):
        small |= {"num_key_value_heads": 2, "head_dim": 16}
    shape = replace(case.shape, fields=case.shape.fields | small)
    return replace(case, shape=shape, layers=min(2, case.layers), batch=2, length=case.length // 32)


def base_model(case: GpuCase, device: str) -> nn.Module:
    """The frozen model, made on the device, with random weights."""
    hf.set_seed(0)
    config = case.shape.config(num_hidden_layers=case.layers, use_cache=False, **case.shape.fields)
    with torch.device(device):
        model: nn.Module = case.shape.model(config, **case.shape.options)
    return model.to(case.dtype).requires_grad_(False).train()


def quantised_model(case: GpuCase, device: str) -> nn.Module:
    """The frozen model with its targeted layers in 4 bit, by bitsandbytes, as QLoRA has them."""
    return quantise_(base_model(case, device), case)


@dataclass
class Training:
    """A model in training, to move its last hidden state along one direction.

    Attributes:
        model: it.
        case: what it is trained on.
        optimizer: None for the floor.
        allocator: None where nothing is allocated.
        forward: what is called instead of ``model``, for instance its compiled form.
        ids: token ids instead of embeddings that need a gradient.
        x: the embeddings, made at the first step.
        readout: the direction, made at the first step.
    """

    model: nn.Module
    case: GpuCase
    optimizer: Any = None
    allocator: Any = None
    forward: Callable[..., Any] | None = None
    ids: Tensor | None = None
    x: Tensor | None = None
    readout: Tensor | None = None

    def gradients(self) -> Tensor:
        """Forward and backward pass; returns the loss."""
        if self.x is None:
            self.x = self.case.inputs(next(self.model.parameters()).device.type)
        if self.readout is None:
            self.readout = direction(self.x)
        inputs = {"inputs_embeds": self.x} if self.ids is None else {"input_ids": self.ids}
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.case.autocast):
            forward = self.model if self.forward is None else self.forward
            last = forward(**inputs).last_hidden_state
            loss: Tensor = (last * self.readout).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        self.x.grad = None
        return loss

    def step(self) -> Tensor:
        """One whole training step; returns the loss."""
        loss = self.gradients()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss


def direction(x: Tensor) -> Tensor:
    """A direction (hidden,) for hidden states x (batch, length, hidden).

    The square of a hidden state would not do: the last normalization makes its mean 1, whatever is trained.
    """
    return torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)


Arm = Callable[[GpuCase, nn.Module], Training]


def lora_model(case: GpuCase, base: nn.Module, rank: int, **choice: Any) -> nn.Module:
    """PEFT's LoRA; ``choice`` may name other modules."""
    choice = {"target_modules": case.shape.targets} | choice
    config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=case.dropout, **choice)
    model: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=case.autocast)  # type: ignore[arg-type]
    return model


def lora(
    case: GpuCase, base: nn.Module, rank: int, *, is_fused: bool = False, **optimizer: Any
) -> Training:
    """Plain LoRA of a rank."""
    model = lora_model(case, base, rank)
    if is_fused and not fuse_(model):
        raise ValueError(f"{case.shape.name} has no layer that the fused function serves")
    return Training(model, case, adamw(model, **optimizer))


def allocated(
    case: GpuCase, base: nn.Module, *, is_fused: bool = False, optimizer: dict[str, Any] | None = None,
    **settings: Any,
) -> Training:  # fmt: skip
    """The LoRA of the initial rank with an allocator attached."""
    training = lora(case, base, case.init_r, is_fused=is_fused, **(optimizer or {}))
    training.allocator = allocator_of(training.model, training.optimizer, case, **settings)
    return training


def in_the_window(case: GpuCase, base: nn.Module) -> Training:
    """The same after a pruning, with pruned components held at 0."""
    training = allocated(case, base)
    prune_in_the_middle_(training.allocator, training.step)
    return training


def frozen(case: GpuCase, base: nn.Module, *, is_fused: bool) -> Training:
    """The same with its final ranks, which differ between modules; some are 0."""
    training = allocated(case, base, is_fused=is_fused)
    freeze_ragged_(training.allocator, training.step)
    return training


ARMS: dict[str, Arm] = {
    FLOOR: lambda case, base: Training(base, case),
    LORA_TARGET: lambda case, base: lora(case, base, case.target_r),
    LORA_INITIAL: lambda case, base: lora(case, base, case.init_r),
    BEFORE: allocated,
    BEFORE_FUSED: lambda case, base: allocated(case, base, is_fused=True),
    WINDOW: in_the_window,
    AFTER: lambda case, base: frozen(case, base, is_fused=False),
    AFTER_FUSED: lambda case, base: frozen(case, base, is_fused=True),
}


def fresh(base: nn.Module) -> nn.Module:
    """A copy of the base for one arm."""
    return copy.deepcopy(base)
