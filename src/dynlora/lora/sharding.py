"""Parameters that are spread over several processes: one way to read, scale and push them.

FSDP2 keeps DTensors; DeepSpeed ZeRO keeps fp32 copies inside its optimizer, a part on every process. The
rest of the package calls these functions and never asks which. DeepSpeed is never imported here unless the
program has done so; then its documented functions for reading and writing partitioned values are used,
the same for stages 1, 2 and 3.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def refuse_fsdp1(model: nn.Module) -> None:
    """Refuse a model inside FSDP1, which flattens parameters and which PyTorch has superseded."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model={type(model).__name__} is wrapped by FullyShardedDataParallel (FSDP1), which keeps "
            "parameters as slices of flat tensors, where no component can be found. Use FSDP2 "
            "(fully_shard; accelerate: fsdp_version: 2), DDP or DeepSpeed."
        )


def unwrap_engine(model: nn.Module) -> nn.Module:
    """The module inside a DeepSpeedEngine, any other unchanged."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        inner: nn.Module = model.module
        return inner
    return model


def zero_optimizer(optimizer: Any) -> Any:
    """The ZeRO optimizer inside a wrapper such as accelerate's, None if there is none."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:
        return None
    kind = deepspeed.runtime.base_optimizer.ZeROOptimizer
    while optimizer is not None and not isinstance(optimizer, kind):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def is_zero_parameter(tensor: Tensor) -> bool:
    """Whether a ZeRO optimizer owns ``tensor``."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process alone cannot change the shape of ``tensor``."""
    return isinstance(tensor, DTensor) or is_zero_parameter(tensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor, any other unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective call), any other unchanged."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not hasattr(tensor, "ds_id"):
        return tensor  # stages 1 and 2 of ZeRO partition the optimizer only
    with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


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
            _scale_zero_(parameter, factor)


def _scale_zero_(parameter: Tensor, factor: Tensor) -> None:
    """Multiply the parameter and its fp32 copy by ``factor``, equal on every process (collective)."""
    deepspeed = sys.modules["deepspeed"]
    exact = deepspeed.utils.safe_get_full_fp32_param(parameter)
    deepspeed.utils.safe_set_full_fp32_param(parameter, exact * factor)
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.mul_(factor)
    else:
        parameter.data.mul_(factor)


def _held_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient between backward and step; of ZeRO the full, averaged one (a collective call)."""
    if is_zero_parameter(parameter):
        gradient: Tensor | None = sys.modules["deepspeed"].utils.safe_get_full_grad(parameter)
        return gradient
    return parameter.grad


@torch.no_grad()
def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient the next step will use: the local part under FSDP, the full one elsewhere."""
    gradient = _held_gradient(parameter)
    return None if gradient is None else local_part(gradient)


@torch.no_grad()
def full_gradient(parameter: Tensor) -> Tensor | None:
    """The whole gradient the next step will use, on every process (a collective call), None for none."""
    gradient = _held_gradient(parameter)
    return None if gradient is None else full_tensor(gradient)


@torch.no_grad()
def add_gradient_(parameter: Tensor, full: Tensor) -> None:
    """Add ``full``, the same on every process, to the gradient that the next step will use."""
    if is_zero_parameter(parameter):
        present = _held_gradient(parameter)
        full = full if present is None else present + full
        sys.modules["deepspeed"].utils.safe_set_full_grad(parameter, full)
        return
    part = distribute_like(full, parameter)
    if parameter.grad is None:
        parameter.grad = part.clone()
    else:
        parameter.grad.add_(part)
