"""What the GPU check compares. Everything that it knows of dynlora is in this file.

An arm is one function that makes a ``Training`` of a case and a fresh copy of its base model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from arms import FOREVER, open_gates_
from cases import LLAMA_1B, LLAMA_8B, ROBERTA, Shape, StepCase
from peft import LoraConfig, get_peft_model
from stock_fused import fuse_
from torch import Tensor, nn

from dynlora import DynLoraConfig, RankAllocator, finalize_

FLOOR = "floor: no adapter"
LORA = "LoRA, target rank"
LORA_INITIAL = "LoRA, initial rank"
LORA_FUSED = "LoRA fused, target rank"
LORA_INITIAL_FUSED = "LoRA fused, initial rank"
BEFORE = "dynlora, PEFT's path"
BEFORE_FUSED = "dynlora, fused"
AFTER = "dynlora, fused, after freeze"


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
    dropout: float = 0.0,
    autocast: bool = False,
) -> GpuCase:
    """A case of ``batch`` sequences of 512 tokens that starts at 1.5 times its target rank."""
    return GpuCase(
        shape, layers, batch, 512, dropout, rank, rank * 3 // 2, torch.bfloat16, autocast
    )


def tiny(case: GpuCase) -> GpuCase:
    """The same case, small enough for a rehearsal on a CPU."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    if case.shape in (LLAMA_1B, LLAMA_8B):
        small |= {"num_key_value_heads": 2, "head_dim": 16}
    shape = replace(case.shape, fields=case.shape.fields | small)
    return replace(
        case, shape=shape, layers=min(2, case.layers), batch=case.batch // 4 + 1, length=16
    )


def base_model(case: GpuCase, device: str) -> nn.Module:
    """The frozen model, made on the device, with random weights."""
    hf.set_seed(0)
    config = case.shape.config(num_hidden_layers=case.layers, use_cache=False, **case.shape.fields)
    with torch.device(device):
        model: nn.Module = case.shape.model(config, **case.shape.options)
    return model.to(case.dtype).requires_grad_(False).train()


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


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW of what is trained, by default at a rate that keeps weights where they are."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], **({"lr": 1e-6} | options)
    )


def lora_model(case: GpuCase, base: nn.Module, rank: int, **choice: Any) -> nn.Module:
    """PEFT's LoRA; ``choice`` may name other modules."""
    choice = {"target_modules": case.shape.targets} | choice
    config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=case.dropout, **choice)
    model: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=case.autocast)  # type: ignore[arg-type]
    return model


def _lora(rank: Callable[[GpuCase], int], *, fused: bool) -> Arm:
    def arm(case: GpuCase, base: nn.Module) -> Training:
        model = lora_model(case, base, rank(case))
        if fused and not fuse_(model):
            raise ValueError(f"{case.shape.name} has no layer that the fused function serves")
        return Training(model, case, adamw(model))

    return arm


def allocated(
    case: GpuCase, base: nn.Module, *, fused: bool, optimizer: dict[str, Any] | None = None,
    is_attached: bool = True, **config: Any,
) -> Training:  # fmt: skip
    """A model whose ranks are allocated, at its start; without the allocator if not ``is_attached``.

    The layers refuse to be trained without an allocator unless nothing is to be pruned: for a comparison
    both models need ``target_r=init_r``.
    """
    fields = {
        "init_r": case.init_r,
        "target_r": case.target_r,
        "lora_dropout": case.dropout,
    } | config
    made = DynLoraConfig(target_modules=case.shape.targets, fused=fused, **fields)
    model = get_peft_model(base, made, autocast_adapter_dtype=case.autocast)  # type: ignore[arg-type]
    stepped = adamw(open_gates_(model), **(optimizer or {}))
    allocator = RankAllocator(model, stepped, total_steps=FOREVER) if is_attached else None
    return Training(model, case, stepped, allocator)


def frozen(case: GpuCase, base: nn.Module) -> Training:
    """The same with its final ranks, which differ between modules."""
    training = allocated(case, base, fused=True)
    training.step()
    training.allocator.freeze_()
    return training


def finalized(training: Training) -> nn.Module:
    """A plain LoRA made of the model, whatever the allocator has seen."""
    if training.allocator is not None:
        training.allocator.detach()
    finalize_(training.model, "default")
    return training.model


ARMS: dict[str, Arm] = {
    FLOOR: lambda case, base: Training(base, case),
    LORA: _lora(lambda case: case.target_r, fused=False),
    LORA_INITIAL: _lora(lambda case: case.init_r, fused=False),
    LORA_FUSED: _lora(lambda case: case.target_r, fused=True),
    LORA_INITIAL_FUSED: _lora(lambda case: case.init_r, fused=True),
    BEFORE: lambda case, base: allocated(case, base, fused=False),
    BEFORE_FUSED: lambda case, base: allocated(case, base, fused=True),
    AFTER: frozen,
}


def fresh(base: nn.Module) -> nn.Module:
    """A copy of the base for one arm."""
    return copy.deepcopy(base)


SHAPES = {"1b": (LLAMA_1B, 8), "8b": (LLAMA_8B, 3), "roberta": (ROBERTA, 12)}
