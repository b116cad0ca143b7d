"""Parameters that are spread over several processes: one way to read, scale and push them.

FSDP2 keeps DTensors, FSDP1 slices of flat tensors (``flat_shards.py``), DeepSpeed ZeRO fp32 copies inside
its optimizer (``zero.py``). The rest of the package calls these functions and never asks which.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dynlora.adapter.flat_shards import (
    flat_shape,
    gather_flat,
    gather_flat_gradient,
    is_flat_shard,
    local_part,
)
from dynlora.adapter.zero import (
    full_zero_gradient,
    gather_zero,
    is_zero_parameter,
    scale_zero_,
    set_zero_gradient_,
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process alone cannot change the shape of ``tensor``."""
    return isinstance(tensor, DTensor) or is_flat_shard(tensor) or is_zero_parameter(tensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective call), any other unchanged."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_flat_shard(tensor):
        return gather_flat(tensor)
    return gather_zero(tensor) if is_zero_parameter(tensor) else tensor


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, wherever its parts are."""
    if is_flat_shard(parameter):
        return flat_shape(parameter)
    return getattr(parameter, "ds_shape", parameter.shape)


def laid_out(full: Tensor, parameter: Tensor) -> Tensor:
    """``full``, equal on every process and of the parameter's whole shape, as the parameter lies."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    return local_part(full, parameter) if is_flat_shard(parameter) else full


@torch.no_grad()
def scale_all_(parameters: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each parameter by its factor, which is ``laid_out`` like it, in place."""
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
    if is_flat_shard(parameter):
        return gather_flat_gradient(parameter)
    gradient = full_zero_gradient(parameter) if is_zero_parameter(parameter) else parameter.grad
    return gradient if gradient is None else whole(gradient)


@torch.no_grad()
def add_gradient_(parameter: Tensor, full: Tensor) -> None:
    """Add ``full``, equal on every process, to the gradient of a flat or ZeRO parameter."""
    if is_zero_parameter(parameter):
        present = full_zero_gradient(parameter)
        set_zero_gradient_(parameter, full if present is None else present + full)
        return
    part = local_part(full, parameter)
    if parameter.grad is not None:
        parameter.grad.add_(part)
    elif part.numel():
        parameter.grad = part.clone()


def needs_full_gradient(parameter: Tensor) -> bool:
    """Whether gradients are read and changed before the step only, whole, by functions of this module."""
    return is_flat_shard(parameter) or is_zero_parameter(parameter)
