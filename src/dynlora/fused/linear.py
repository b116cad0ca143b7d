"""Autograd functions for a LoRA layer: y = base(x) + s · (mask ⊙ x) Aᵀ Bᵀ; mostly base(x) = x Wᵀ + bias.

PEFT's forward makes separate passes over (tokens, out) tensors to scale the update, to add it, and
to sum two gradients of x, and keeps the dropped-out input until the backward pass. Here s is folded
into B, products are accumulated where they belong, and only x, x Aᵀ and the mask of the dropout
(one byte an entry) are kept.

The result is PEFT's, to rounding. With dropout > 0 it draws another mask of the same law.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynlora.fused.conditions import is_autocast


def fused_forward(layer: Any, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``layer`` computes for x (..., in), as (..., out) in ``dtype``.

    ``adapter`` is what ``fusable_adapter`` says of the layer, ``dtype`` what ``common_dtype`` says.
    """
    base, weight = layer.base_layer, layer.base_layer.weight.to(dtype)
    a, b = (factor[adapter].weight.to(dtype) for factor in (layer.lora_A, layer.lora_B))
    bias = None if base.bias is None else base.bias.to(dtype)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    mask, scale = mask_and_scale(layer, adapter, rows)
    with no_autocast(x):
        y: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch's
            rows, weight, bias, a, b, scale, mask
        )
    return y.view(*x.shape[:-1], y.shape[-1])


def fused_update(layer: Any, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``fused_forward``, where the base has a product of its own, as quantised ones have.

    Beside PEFT's forward it saves the passes that copy the base's output and scale the update.
    ``adapter`` is what ``fusable_update`` says of the layer, ``dtype`` what ``update_dtype`` says; the
    result has the dtype of the base's output.
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


class LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · z Bᵀ,  z = (mask ⊙ x) Aᵀ; W and bias are frozen.

    Gradients:  dB = scale · dyᵀ z,  dz = scale · dy B,  dA = dzᵀ (mask ⊙ x),
    dx = dy W + mask ⊙ (dz A). They can be differentiated again.
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
        """Return y (tokens, out) for x and mask (tokens, in), W (out, in), A (r, in), B (out, r)."""
        z = masked(x, mask) @ a.T
        y = F.linear(x, weight, bias)
        y.addmm_(z, b.T, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, z, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B that are asked for."""
        (dy,) = grads
        x, weight, a, b, z, mask = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _, _ = ctx.needs_input_grad
        with no_autocast(dy):  # whoever calls backward() inside autocast
            wants = (wants_x, wants_a, wants_b)
            dx, da, db = update_gradients(dy, x, a, b, z, mask, ctx.scale, wants)
            if dx is not None:
                dx = dx.addmm_(dy, weight)
        return dx, None, None, da, db, None, None


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
            dx, da, db = update_gradients(dy.to(x.dtype), x, a, b, z, mask, ctx.scale, tuple(wants))
        return dy if wants_result else None, dx, da, db, None, None


def update_gradients(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    mask: Tensor | None,
    scale: float,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, A and B through scale · z Bᵀ, those that ``wants`` asks for.

    Shapes as in ``LoraLinear``; dy (tokens, out), z (tokens, r).
    """
    wants_x, wants_a, wants_b = wants
    if torch.is_grad_enabled():  # to be differentiated again: z must know its origin
        z = masked(x, mask) @ a.T
    dx = da = db = None
    if wants_b:
        db = (z.T @ dy).T * scale  # at some ranks several times faster on a CPU than dyᵀ z
    if wants_x or wants_a:
        dz = dy @ (b * scale)
    if wants_a:
        da = dz.T @ masked(x, mask)
    if wants_x:
        dx = dz @ a
        if mask is not None:
            dx = dx.mul_(as_factor(mask, dx))
    return dx, da, db


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations keep their dtype; it costs nothing where autocast is off."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def mask_and_scale(layer: Any, adapter: str, x: Tensor) -> tuple[Tensor | None, float]:
    """The dropout mask that ``layer`` applies to x now, None for all of x, and what scales the update."""
    dropout, scale = layer.lora_dropout[adapter], layer.scaling[adapter]
    if type(dropout) is nn.Identity or not dropout.training or dropout.p == 0:
        return None, scale
    mask, kept = keep_mask(x, dropout.p)
    return mask, scale / kept


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A dropout mask for x, False with probability p, and the exact probability of True.

    On a CPU four entries share one 64-bit draw, which is several times faster than one draw each;
    p is then rounded to 1/65536.

    >>> mask, kept = keep_mask(torch.zeros(100, 100), 0.25)
    >>> kept, abs(mask.float().mean().item() - kept) < 0.02
    (0.75, True)
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), 1 - p
    dropped = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return lanes >= dropped - 2**15, 1 - dropped / 2**16


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x where the mask holds, else 0; x itself without a mask."""
    if mask is None:
        return x
    if x.device.type == "cpu":
        return as_factor(mask, x).mul_(x)
    return torch.where(mask, x, 0)


def as_factor(mask: Tensor, x: Tensor) -> Tensor:
    """The mask in a dtype that multiplies x fast: on a CPU two dtypes are many times slower."""
    return mask.to(x.dtype) if x.device.type == "cpu" else mask
