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


def fusable_adapter(layer: Any) -> str | None:
    """The one adapter of PEFT's ``lora.Linear`` that can be computed with its base now, or None."""
    base = layer.base_layer
    is_frozen_linear = (
        type(base) is nn.Linear
        and type(base.weight) in _PLAIN
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
    )
    return None if not is_frozen_linear or _is_watched(base) else fusable_update(layer)


def fusable_update(layer: Any) -> str | None:
    """The one adapter of a LoRA layer whose update can be computed and added now, or None.

    The layer must add ``lora_B(lora_A(dropout(x))) * scaling`` to its base's output.
    """
    active = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    adapter: str = active[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return None
    lora_a, lora_b = layer.lora_A[adapter], layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    is_common = (
        all(type(part) is nn.Linear and part.bias is None for part in (lora_a, lora_b))
        and all(type(part.weight) in _PLAIN for part in (lora_a, lora_b))
        # PEFT makes it a tensor for compiled hot-swapping, to be read at each call
        and isinstance(layer.scaling[adapter], (int, float))
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p < 1))
    )
    is_watched = any(_is_watched(part) for part in (lora_a, lora_b, dropout))
    return adapter if is_common and not is_watched and not _is_transformed() else None


def _is_watched(part: nn.Module) -> bool:
    """Whether the forward of this module is replaced, or hooks wait for it."""
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
    )


def _is_transformed() -> bool:
    """Whether all modules are hooked, or a tracer or function transform sees every operation."""
    return bool(
        hooks_of_all._has_any_global_hook()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0  # the fused function has no forward-mode derivative
    )


def is_worthwhile(layer: nn.Module) -> bool:
    """Whether the fused function can save something in this call; else PEFT's forward runs.

    Not in code that torch.compile traces: inductor fuses what it sees of PEFT's forward, and the
    function would stand in its way.

    Only where a backward pass may follow: else there is nothing to keep, the checks take longer
    than a few tokens, and what is generated or evaluated is PEFT's to the bit. Not by grad mode
    alone: a checkpoint's first forward runs without gradients, and must draw its dropout as the
    second does.
    """
    return not torch.compiler.is_compiling() and (layer.training or torch.is_grad_enabled())


def common_dtype(layer: Any, adapter: str, x: Tensor) -> torch.dtype | None:
    """The dtype all products of ``fused_forward`` are computed in, or None where PEFT mixes dtypes.

    Under autocast it is autocast's. Without it, x and all weights must agree: PEFT computes an
    adapter in float32 over a base in bfloat16 in two dtypes.
    """
    weights = (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter])
    return _product_dtype(x, (x.dtype, *(part.weight.dtype for part in weights)))


def update_dtype(layer: Any, adapter: str, x: Tensor) -> torch.dtype | None:
    """The dtype in which the products of ``fused_update`` are computed, or None to leave it to PEFT.

    Under autocast it is autocast's, without it the adapter's, to which PEFT casts x.
    """
    a, b = (factor[adapter].weight.dtype for factor in (layer.lora_A, layer.lora_B))
    is_cast = layer.cast_input_dtype_enabled and x.is_floating_point() and not is_autocast(x)
    return _product_dtype(x, (a if is_cast else x.dtype, a, b))


def _product_dtype(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.dtype | None:
    """The dtype of products of x with weights of these dtypes, or None if only PEFT can tell."""
    if type(x) not in _PLAIN:
        return None
    if is_autocast(x):
        exempt = any(d == torch.float64 or not d.is_floating_point for d in dtypes)
        return None if exempt else torch.get_autocast_dtype(x.device.type)
    return dtypes[0] if len(set(dtypes)) == 1 else None


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; some devices, such as meta, have none."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
