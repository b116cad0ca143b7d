"""The update of a LoRA layer added to whatever its base computed: y = base(x) + s · (mask ⊙ x) Aᵀ Bᵀ.

For bases with a product of their own, such as quantised ones. Beside PEFT's forward it saves the
passes that copy the base's output and scale the update, and keeps a dropout mask instead of the
dropped-out input.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora.fused.linear import mask_and_scale, masked, no_autocast, update_gradients


def fused_update(layer: Any, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``layer`` computes for x (..., in), as (..., out) in the dtype of its base's output.

    Args:
        layer: a layer for which ``fusable_update`` names ``adapter``.
        adapter: the active adapter.
        x: the input.
        dtype: what ``update_dtype`` says.
    """
    result = layer.base_layer(x)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    a, b = (factor[adapter].weight.to(dtype) for factor in (layer.lora_A, layer.lora_B))
    mask, scale = mask_and_scale(layer, adapter, rows)
    with no_autocast(x):
        y: Tensor = LoraUpdate.apply(  # type: ignore[no-untyped-call]  # torch's
            result.reshape(-1, result.shape[-1]), rows, a, b, scale, mask
        )
    return y.view(result.shape)


class LoraUpdate(torch.autograd.Function):
    """y = result + scale · z Bᵀ,  z = (mask ⊙ x) Aᵀ;  gradients as in ``LoraLinear``."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        """Return y like result (tokens, out) for x and mask (tokens, in), A (r, in), B (out, r)."""
        z = masked(x, mask) @ a.T
        ctx.save_for_backward(x, a, b, z, mask)
        ctx.scale = scale
        if result.dtype == z.dtype:
            return torch.addmm(result, z, b.T, alpha=scale)
        return torch.add(result, (z @ b.T).to(result.dtype), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of result, x, A and B that are asked for."""
        (dy,) = grads
        x, a, b, z, mask = ctx.saved_tensors
        wants_result, *wants = ctx.needs_input_grad[:4]
        with no_autocast(dy):  # whoever calls backward() inside autocast
            if torch.is_grad_enabled():  # to be differentiated again: z must know its origin
                z = masked(x, mask) @ a.T
            dx, da, db = update_gradients(dy.to(x.dtype), x, a, b, z, mask, ctx.scale, tuple(wants))
        return dy if wants_result else None, dx, da, db, None, None
