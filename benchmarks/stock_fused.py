"""A prototype: PEFT's own LoRA layers with one autograd function, y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ.

Made to learn whether fusing pays on a GPU. It serves a plain ``nn.Linear`` with one active adapter, does
not look for hooks, and cannot be differentiated twice.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn


def fuse_(model: nn.Module) -> int:
    """Replace ``forward`` of the LoRA layers that the function can serve.

    Returns:
        How many layers were replaced.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, lora.Linear) and type(m.base_layer) is nn.Linear and not m.lora_variant
    ]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """What the layer computes for x (..., in), as (..., out)."""
    adapter = layer.active_adapters[0]
    base, device = layer.base_layer, x.device.type
    dtype = base.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    a, b = (m[adapter].weight.to(dtype) for m in (layer.lora_A, layer.lora_B))
    bias = None if base.bias is None else base.bias.to(dtype)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    dropout, scale, mask = layer.lora_dropout[adapter], layer.scaling[adapter], None
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout.p)
        scale = scale / (1 - dropout.p)
    with torch.autocast(device, enabled=False):
        y: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch's
            rows, base.weight.to(dtype), bias, a, b, scale, mask
        )
    return y.view(*x.shape[:-1], y.shape[-1])


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · z Bᵀ,  z = (x ⊙ mask) Aᵀ; W and bias are frozen.

    Gradients:  dB = scale · dyᵀ z,  dz = scale · dy B,  dA = dzᵀ (x ⊙ mask),
    dx = dy W + (dz A) ⊙ mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        """Return y (tokens, out) for x, mask (tokens, in), W (out, in), A (r, in), B (out, r)."""
        z = _masked(x, mask) @ a.T
        y = F.linear(x, weight, bias)
        y = y.addmm_(z, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, z, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        (dy,) = grads
        x, weight, a, b, z, mask = ctx.saved_tensors
        db = (z.T @ dy).T * ctx.scale
        dz = dy @ (b * ctx.scale)
        da = dz.T @ _masked(x, mask)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dz @ a
            if mask is not None:
                dx = dx.mul_(mask)
            dx = dx.addmm_(dy, weight)
        return dx, None, None, da, db, None, None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)
