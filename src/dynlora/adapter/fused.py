"""One autograd function for the common layer: y = x Wᵀ + b + s · (dropout(x) Aᵀ ⊙ c) Bᵀ.

PEFT's path makes separate passes over (tokens, out) tensors to scale the update, to add it, and to sum two
gradients of x, and keeps the gated, dropped-out and scaled intermediates until the backward pass.
Here c and s are one vector of rank entries folded into B, products are accumulated where they
belong, and only x, x Aᵀ and the mask of the dropout (one byte an entry) are kept.

It serves a plain ``nn.Linear`` with one active gated adapter. ``fusable_adapter`` holds the conditions;
wherever one fails, PEFT's own path runs. Both compute the same function, to rounding; with dropout > 0
they draw other masks of the same law.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

_PLAIN = (Tensor, nn.Parameter)  # no DTensor, no quantised tensor


def fusable_adapter(layer: Any, gated_linear: type[nn.Module] | None) -> str | None:
    """The one adapter of a LoRA layer that the fused function can compute now, or None.

    Args:
        layer: a ``peft.tuners.lora.Linear``.
        gated_linear: the class of a gated ``lora_A`` over a plain ``nn.Linear``.
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
        and type(lora_a) is gated_linear
        and lora_a.is_fused
        and type(lora_b) is nn.Linear
        and lora_b.bias is None
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
    """The dtype all products are computed in, or None where PEFT's path would mix dtypes.

    Under autocast it is autocast's. Without it, x and all weights must agree.
    """
    tensors = (
        x,
        layer.base_layer.weight,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
    )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        exempt = any(t.dtype == torch.float64 or not t.is_floating_point() for t in tensors)
        return None if exempt else torch.get_autocast_dtype(device)
    return x.dtype if all(t.dtype == x.dtype for t in tensors) else None


def fused_forward(layer: Any, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``layer`` computes for x (..., in), as (..., out) in ``dtype``.

    Args:
        layer: a layer for which ``fusable_adapter`` names ``adapter``.
        adapter: the active adapter.
        x: the input.
        dtype: what ``common_dtype`` says.
    """
    base, lora_a = layer.base_layer, layer.lora_A[adapter]
    weight, a, b = (m.weight.to(dtype) for m in (base, lora_a, layer.lora_B[adapter]))
    bias = None if base.bias is None else base.bias.to(dtype)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    dropout, scale, mask = layer.lora_dropout[adapter], layer.scaling[adapter], None
    if type(dropout) is nn.Dropout and dropout.training and dropout.p > 0:
        mask, kept = keep_mask(rows, dropout.p)
        scale /= kept
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = GatedLinear.apply(  # type: ignore[no-untyped-call]  # torch's
            rows, weight, bias, a, b, lora_a.c, scale, mask
        )
    return y.view(*x.shape[:-1], y.shape[-1])


def keep_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A dropout mask for x, False with probability p, and the exact probability of True.

    On a CPU four entries share one 64-bit draw, which is several times faster than one draw each; p is
    then rounded to 1/65536.

    >>> mask, kept = keep_mask(torch.zeros(100, 100), 0.25)
    >>> kept, abs(mask.float().mean().item() - kept) < 0.02
    (0.75, True)
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), 1 - p
    dropped = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return lanes >= dropped - 2**15, 1 - dropped / 2**16


class GatedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + z (B ⊙ g)ᵀ,  z = (x ⊙ mask) Aᵀ,  g = scale · c; W and bias are frozen.

    Gradients, for G = dyᵀ z:  dB = G ⊙ g,  dc = scale · Σ_out (G ⊙ B),  dz = dy (B ⊙ g),
    dA = dzᵀ (x ⊙ mask),  dx = dy W + (dz A) ⊙ mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        """Return y (tokens, out) for x, mask (tokens, in), W (out, in), A (r, in), B (out, r), c (r,)."""
        z = masked(x, mask) @ a.T
        y = F.linear(x, weight, bias)
        y.addmm_(z, (b * (c * scale)).to(b.dtype).T)
        ctx.save_for_backward(x, weight, a, b, c, z, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and c that are asked for."""
        (dy,) = grads
        x, weight, a, b, c, z, mask = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, wants_c, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again: z must know where it comes from
            z = masked(x, mask) @ a.T
        dx = da = db = dc = None
        gain = c * ctx.scale
        if wants_b or wants_c:
            g = (z.T @ dy).T  # at some ranks several times faster on a CPU than dyᵀ z
            db = (g * gain).to(b.dtype)
            dc = (g * b).sum(0).to(c.dtype) * ctx.scale
        if wants_x or wants_a:
            dz = dy @ (b * gain).to(b.dtype)
        if wants_a:
            da = dz.T @ masked(x, mask)
        if wants_x:
            dx = dz @ a
            if mask is not None:
                dx = dx.mul_(as_factor(mask, dx))
            dx = dx.addmm_(dy, weight)
        return dx, None, None, da, db, dc, None, None


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x where the mask holds, else 0; x itself without a mask."""
    if mask is None:
        return x
    if x.device.type == "cpu":
        return as_factor(mask, x).mul_(x)
    return torch.where(mask, x, 0)


def as_factor(mask: Tensor, x: Tensor) -> Tensor:
    """The mask in a dtype that x multiplies fast: on a CPU a product of two dtypes is many times slower."""
    return mask.to(x.dtype) if x.device.type == "cpu" else mask
