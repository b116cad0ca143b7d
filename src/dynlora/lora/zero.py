"""DeepSpeed ZeRO: the optimizer owns fp32 copies of the parameters, a part on every process.

DeepSpeed is never imported here unless the program has done so; then its documented functions for
reading and writing partitioned values are used, the same for stages 1, 2 and 3.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_zero_parameter(tensor: Tensor) -> bool:
    """Whether a ZeRO optimizer owns ``tensor``."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


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


def gather_zero(parameter: Tensor) -> Tensor:
    """The full parameter, on every process (a collective call in stage 3)."""
    if not hasattr(parameter, "ds_id"):
        return parameter  # stages 1 and 2 partition the optimizer only
    deepspeed = sys.modules["deepspeed"]
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def scale_zero_(parameter: Tensor, factor: Tensor) -> None:
    """Multiply the parameter and its fp32 copy by ``factor``, equal on every process (collective)."""
    deepspeed = sys.modules["deepspeed"]
    exact = deepspeed.utils.safe_get_full_fp32_param(parameter)
    deepspeed.utils.safe_set_full_fp32_param(parameter, exact * factor)
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.mul_(factor)
    else:
        parameter.data.mul_(factor)


def full_zero_gradient(parameter: Tensor) -> Tensor | None:
    """The averaged gradient between backward and step, None if there is none (a collective call)."""
    gradient: Tensor | None = sys.modules["deepspeed"].utils.safe_get_full_grad(parameter)
    return gradient


def set_zero_gradient_(parameter: Tensor, gradient: Tensor) -> None:
    """Replace the gradient that the next step will use, (full shape)."""
    sys.modules["deepspeed"].utils.safe_set_full_grad(parameter, gradient)
