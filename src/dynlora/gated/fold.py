"""From gates to plain LoRA: fold c and the scaling into B, and leave dead components out.

    A' = A[keep],  B' = s · (B ⊙ c)[:, keep],  s' = lora_alpha' / r' = 1

The same numbers serve ``finalize_``, which installs them in the model, and the export, which
writes them to disk.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from dynlora.adapter_files.format import OUT_PROJECTION
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.configs import plain_config
from dynlora.gated.guard import stop_waiting
from dynlora.gated.layer import EmbeddingGate, GatedComponents, can_drop
from dynlora.gated.model import DynLoraModel
from dynlora.lora.components import (
    find_adapter,
    find_components,
    note_layer_rank_,
    unwrapped,
)
from dynlora.lora.configs import swap_config_
from dynlora.lora.sharding import full_tensor

Folded = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def fold(layer: GatedComponents) -> tuple[Tensor, Tensor]:
    """A' (live rank, in, ...) and B' (out, live rank, ...) of one layer, with scaling 1.

    Live is what contributes: before the freeze a component may be on its way back, with a gate that is
    no longer 0, and leaving it out would change the function. Folding is done in fp32 at least and
    returned in the factors' own dtype.
    """
    a, b, c = (full_tensor(f.parameter).detach() for f in layer.factors)
    return fold_factors(a, b, c, scaling=layer.scaling or 1.0)


def fold_factors(a: Tensor, b: Tensor, c: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """A' = A[keep] and B' = s · (B ⊙ c)[:, keep]; kept is what has a gate.

    Args:
        a: (rank, in, ...).
        b: (out, rank, ...).
        c: gates, (rank,); ones for a plain LoRA.
        scaling: s.
    """
    kept = c.nonzero().flatten()
    exact = torch.promote_types(b.dtype, torch.float32)
    gain = (c.to(exact) * scaling).view(1, -1, *[1] * (b.ndim - 2))
    folded_b = (b.to(exact) * gain).to(b.dtype).index_select(1, kept)
    return a.index_select(0, kept).contiguous(), folded_b.contiguous()


def fold_all(layers: list[GatedComponents]) -> Folded:
    """Folded factors of every layer by name; dropped layers are absent, dead ones have rank 0."""
    folded = {m.name: fold(m) for m in layers if not m.is_dropped}
    pad_halves(folded)
    return folded


def pad_halves(folded: Folded) -> None:
    """Give both halves of each MultiheadAttention one rank, as stock PEFT has it, in place."""
    for name in folded:
        inner = name + OUT_PROJECTION
        if inner in folded:
            rank = max(folded[name][0].shape[0], folded[inner][0].shape[0])
            folded[name] = padded(*folded[name], rank)
            folded[inner] = padded(*folded[inner], rank)


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with zero components up to ``rank``."""
    gap = rank - a.shape[0]
    a = torch.cat([a, a.new_zeros(gap, *a.shape[1:])])
    return a, torch.cat([b, b.new_zeros(b.shape[0], gap, *b.shape[2:])], dim=1)


def finalize_(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """Turn a gated adapter into a plain LoRA, in place; the model's function stays the same.

    An adapter that is a stock LoRA already stays as it is.

    Gates and scaling are folded into B, dead components go, rank-0 modules get their base layer back,
    and ``peft_config`` becomes a LoraConfig: from then on everything is stock PEFT.

    Args:
        model: a model with a LoRA adapter, wrapped or not.
        adapter: which one; may be left out if there is one, or one that is trainable.

    Returns:
        Live rank by module name, zeros included.

    Raises:
        ValueError: there is no such adapter, none of its components is alive, or FSDP or ZeRO shards it.
    """
    adapter, config = find_adapter(model, adapter)
    modules = find_components(model, adapter)
    if not isinstance(config, DynLoraConfig):
        return {m.name: m.rank for m in modules}
    layers = [m for m in modules if isinstance(m, GatedComponents)]
    if any(m.is_sharded for m in layers):
        raise ValueError(
            f"adapter={adapter!r} is sharded over several processes (FSDP, ZeRO) and cannot change its "
            "shapes in place. Call export_lora(model, folder) on every process: it gathers the adapter and "
            "the first process writes the plain LoRA."
        )
    folded = fold_all(layers)
    ranks = {m.name: folded[m.name][0].shape[0] if m.name in folded else 0 for m in layers}
    plain = plain_config(model, config, ranks)
    for gated in layers:
        stop_waiting(gated.layer, adapter)
        if ranks[gated.name]:
            _install_(gated, *folded[gated.name])
    base_model = unwrapped(model)
    for gated in layers:
        if ranks[gated.name] == 0:
            _remove_(base_model, gated)
    leave_gates_(model, adapter, plain)
    return ranks


def _install_(gated: GatedComponents, a: Tensor, b: Tensor) -> None:
    layer, adapter = gated.layer, gated.adapter
    trained = gated.gate.requires_grad
    rank = a.shape[0]
    new_a, new_b = nn.Parameter(a, requires_grad=trained), nn.Parameter(b, requires_grad=trained)
    if isinstance(layer, lora.Embedding):
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = new_a, new_b
        del layer.lora_c[adapter]
        if isinstance(layer.lora_variant.get(adapter), EmbeddingGate):
            del layer.lora_variant[adapter]
    else:
        lora_a = layer.lora_A[adapter]
        del lora_a.c
        lora_a.__class__ = type(lora_a).__bases__[0]
        lora_a.weight, layer.lora_B[adapter].weight = new_a, new_b
    layer.use_rslora[adapter] = False
    layer.scaling[adapter] = 1.0
    note_layer_rank_(layer, adapter, rank)
    layer.lora_alpha[adapter] = rank
    _forget_gates_(layer, adapter)


def _forget_gates_(layer: Any, adapter: str) -> None:
    """Drop the buffers, and become a stock LoRA layer once no adapter has gates."""
    del layer.lora_ema[adapter], layer.lora_live[adapter]
    layer.__dict__.get("dropped_factors", {}).pop(adapter, None)
    if len(layer.lora_ema) == 0:
        del layer.lora_ema, layer.lora_live
        layer.__dict__.pop("adapter_layer_names", None)
        layer.__dict__.pop("dropped_factors", None)
        if hasattr(layer, "lora_c"):
            del layer.lora_c
        layer.__class__ = layer.stock_class


def _remove_(base_model: nn.Module, gated: GatedComponents) -> None:
    """Take a rank-0 adapter out of its layer, and the layer out of the model if it was the last.

    PEFT's ``delete_adapter`` would make another adapter active in this one layer only.
    """
    layer = gated.layer
    entries = (*layer.adapter_layer_names, *layer.other_param_names)
    _forget_gates_(layer, gated.adapter)
    for name in entries:
        if gated.adapter in (held := getattr(layer, name, {})):
            del held[gated.adapter]
    layer.lora_variant.pop(gated.adapter, None)
    if len(layer.lora_dropout) == 0 and can_drop(layer):
        parent, _, child = gated.name.rpartition(".")
        setattr(base_model.get_submodule(parent), child, layer.get_base_layer())


def leave_gates_(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Replace the adapter's config, and our classes once no gates are left in the model."""
    swap_config_(model, adapter, config)
    for module in model.modules():
        if isinstance(module, DynLoraModel) and not any(
            isinstance(c, DynLoraConfig) for c in module.peft_config.values()
        ):
            module.__class__ = LoraModel
    for module in model.modules():
        if isinstance(module, PeftModel) and type(module.base_model) is LoraModel:
            module.peft_type = PeftType.LORA
