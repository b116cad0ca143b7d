"""When a LoRA layer may be computed by the fused function: the layer, what observes it, the dtypes.

Everything is asked at each call, because users merge, disable, hook and cast between two calls.
Where a condition fails, PEFT's own forward runs. The private names of torch that this room reads
stand here and nowhere else in it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks_of_all

_PLAIN = (Tensor, nn.Parameter)  # not a DTensor, a quantised or a nested tensor


def fusable_adapter(layer: Any, lora_a_type: type[nn.Module] = nn.Linear) -> str | None:
    """The one adapter of a LoRA layer that the fused function can compute now, or None.

    Args:
        layer: a ``peft.tuners.lora.Linear``.
        lora_a_type: the exact class that ``lora_A[adapter]`` must have.
    """
    active = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    adapter: str = active[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return None
    parts = (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter])
    base, lora_a, lora_b = parts
    dropout = layer.lora_dropout[adapter]
    is_common = (
        type(base) is nn.Linear
        and type(lora_a) is lora_a_type
        and lora_a.bias is None
        and type(lora_b) is nn.Linear
        and lora_b.bias is None
        # PEFT makes it a tensor for compiled hot-swapping, to be read at each call
        and isinstance(layer.scaling[adapter], (int, float))
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p < 1))
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and all(type(part.weight) in _PLAIN for part in parts)
    )
    return adapter if is_common and not _is_observed((*parts, dropout)) else None


def _is_observed(parts: tuple[nn.Module, ...]) -> bool:
    """Whether anybody waits for the parts' own forward: hooks, replaced methods, tracers."""
    return bool(
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0  # the fused function has no forward-mode derivative
        or any(
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or "forward" in part.__dict__
            for part in parts
        )
    )


def common_dtype(layer: Any, adapter: str, x: Tensor) -> torch.dtype | None:
    """The dtype all products are computed in, or None where only PEFT's forward can tell.

    Under autocast it is autocast's. Without it, x and all weights must agree: PEFT computes an
    adapter in float32 over a base in bfloat16 in two dtypes, and so must we.

    Args:
        layer: a layer for which ``fusable_adapter`` names ``adapter``.
        adapter: the active adapter.
        x: the input, (..., in).
    """
    if type(x) not in _PLAIN:
        return None
    tensors = (
        x,
        layer.base_layer.weight,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
    )
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        exempt = any(t.dtype == torch.float64 or not t.is_floating_point() for t in tensors)
        return None if exempt else torch.get_autocast_dtype(device)
    return x.dtype if all(t.dtype == x.dtype for t in tensors) else None
