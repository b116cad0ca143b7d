"""Parameters that are spread over several processes: one way to read, scale and push them.

FSDP2 keeps DTensors, DeepSpeed ZeRO fp32 copies inside its optimizer (``zero.py``). The rest of the
package calls these functions and never asks which.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from dynlora.lora.zero import (
    full_zero_gradient,
    gather_zero,
    is_zero_parameter,
    scale_zero_,
    set_zero_gradient_,
)


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuse a model inside FSDP1, which flattens parameters and which PyTorch has superseded.

    Raises:
        ValueError: ``model`` holds a FullyShardedDataParallel wrapper.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model={type(model).__name__} is wrapped by FullyShardedDataParallel (FSDP1), which keeps "
            "parameters as slices of flat tensors, where no component can be found. Use FSDP2 "
            "(fully_shard; accelerate: fsdp_version: 2), DDP or DeepSpeed."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process alone cannot change the shape of ``tensor``."""
    return isinstance(tensor, DTensor) or is_zero_parameter(tensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective call), any other unchanged."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return gather_zero(tensor) if is_zero_parameter(tensor) else tensor


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, wherever its parts are."""
    return getattr(parameter, "ds_shape", parameter.shape)


def distribute_like(full: Tensor, parameter: Tensor) -> Tensor:
    """``full``, the same on every process, sharded as ``parameter`` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return full


@torch.no_grad()
def scale_all_(parameters: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each parameter by its factor, sharded like it, in place."""
    local = [(p, f) for p, f in zip(parameters, factors, strict=True) if not is_zero_parameter(p)]
    if local:
        torch._foreach_mul_([p.data for p, _ in local], [f for _, f in local])
    for parameter, factor in zip(parameters, factors, strict=True):
        if is_zero_parameter(parameter):
            scale_zero_(parameter, factor)


@torch.no_grad()
def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient the next step will use: the local part under FSDP, the full one elsewhere."""
    if is_zero_parameter(parameter):
        return full_zero_gradient(parameter)
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@torch.no_grad()
def full_gradient(parameter: Tensor) -> Tensor | None:
    """The whole gradient the next step will use, on every process (a collective call), None for none."""
    gradient = full_zero_gradient(parameter) if is_zero_parameter(parameter) else parameter.grad
    return gradient if gradient is None else full_tensor(gradient)


@torch.no_grad()
def add_gradient_(parameter: Tensor, full: Tensor) -> None:
    """Add ``full``, the same on every process, to the gradient that the next step will use."""
    if is_zero_parameter(parameter):
        present = full_zero_gradient(parameter)
        set_zero_gradient_(parameter, full if present is None else present + full)
        return
    part = distribute_like(full, parameter)
    if parameter.grad is None:
        parameter.grad = part.clone()
    else:
        parameter.grad.add_(part)
