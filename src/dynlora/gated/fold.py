"""From gates to plain LoRA: fold c and the scaling into B, and leave dead components out.

    A' = A[keep],  B' = s · (B ⊙ c)[:, keep],  s' = lora_alpha' / r' = 1

The same numbers serve ``finalize_``, which installs them in the model, and the export, which
writes them to disk.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from dynlora._private import without_active_adapter
from dynlora.adapter_files.format import OUT_PROJECTION
from dynlora.adapter_files.plain_config import exact_key
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.layer import GatedComponents, detach_gate_
from dynlora.gated.model import DynLoraModel
from dynlora.lora.components import find_adapter, find_components, note_layer_rank_, unwrapped
from dynlora.lora.configs import swap_config_, target_fields
from dynlora.lora.sharding import full_tensor

Folded = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def fold_all(modules: Sequence[GatedComponents]) -> Folded:
    """A' (live rank, in, ...) and B' (out, live rank, ...) by module, with scaling 1; no dropped ones.

    Live is what contributes: before the freeze a component may be on its way back, with a gate that is
    no longer 0, and leaving it out would change the function. Folding is done in fp32 at least and
    returned in the factors' own dtype. Both halves of a MultiheadAttention get one rank, as stock PEFT
    has it, by components of zeros.
    """
    folded = {m.name: _folded(m) for m in modules if not m.is_dropped}
    for name in folded:
        if (inner := name + OUT_PROJECTION) in folded:
            rank = max(len(folded[name][0]), len(folded[inner][0]))
            for half in (name, inner):
                a, b = folded[half]
                gap = rank - len(a)
                b = torch.cat([b, b.new_zeros(b.shape[0], gap, *b.shape[2:])], dim=1)
                folded[half] = torch.cat([a, a.new_zeros(gap, *a.shape[1:])]), b
    return folded


def _folded(module: GatedComponents) -> tuple[Tensor, Tensor]:
    a, b, c = (full_tensor(f.parameter).detach() for f in module.factors)
    kept = c.nonzero().flatten()
    exact = torch.promote_types(b.dtype, torch.float32)
    gain = (c.to(exact) * (module.scaling or 1.0)).view(1, -1, *[1] * (b.ndim - 2))
    folded_b = (b.to(exact) * gain).to(b.dtype).index_select(1, kept)
    return a.index_select(0, kept).contiguous(), folded_b.contiguous()


def plain_config(model: nn.Module, config: DynLoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The LoraConfig of a finished adapter of these ranks, with scaling 1 and without rank-0 modules.

    Raises:
        ValueError: no component is alive, so there is nothing to write.
    """
    ranks = {n: r for n, r in ranks.items() if not n.endswith(OUT_PROJECTION)}
    largest = max(ranks.values(), default=0)
    if largest == 0:
        raise ValueError(
            "model has no live component: every gate is 0, so the adapter equals the base model. Train "
            "it first (the first optimizer step moves the gates away from 0)."
        )
    pattern = {exact_key(n): r for n, r in ranks.items() if 0 < r < largest}
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    fields = shared | {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,
        **target_fields(model, config, ranks),
    }
    return LoraConfig(**fields)


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
    gated = [m for m in modules if isinstance(m, GatedComponents)]
    if any(m.is_sharded for m in gated):
        raise ValueError(
            f"adapter={adapter!r} is sharded over several processes (FSDP, ZeRO) and cannot change its "
            "shapes in place. Call export_lora(model, folder) on every process: it gathers the adapter and "
            "the first process writes the plain LoRA."
        )
    folded = fold_all(gated)
    ranks = {m.name: len(folded[m.name][0]) if m.name in folded else 0 for m in gated}
    plain = plain_config(model, config, ranks)
    base_model = unwrapped(model)
    for module in gated:
        if ranks[module.name]:
            _install_(module, *folded[module.name])
    for module in gated:
        if not ranks[module.name]:
            _remove_(base_model, module)
    _leave_gates_(model, adapter, plain)
    return ranks


def _install_(module: GatedComponents, a: Tensor, b: Tensor) -> None:
    """Make the layer a stock LoRA of these factors."""
    layer, adapter = module.layer, module.adapter
    new_a, new_b = (nn.Parameter(f, requires_grad=module.gate.requires_grad) for f in (a, b))
    detach_gate_(layer, adapter)
    if isinstance(layer, lora.Embedding):
        layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter] = new_a, new_b
    else:
        layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = new_a, new_b
    layer.use_rslora[adapter], layer.scaling[adapter] = False, 1.0
    note_layer_rank_(layer, adapter, len(a))


def _remove_(base_model: nn.Module, module: GatedComponents) -> None:
    """Take a rank-0 adapter out of its layer, and the layer out of the model if it was the last."""
    layer, is_half = module.layer, module.layer.is_half_of_attention
    detach_gate_(layer, module.adapter)
    with without_active_adapter(layer):  # PEFT would make another one active in this layer only
        layer.delete_adapter(module.adapter)
    if len(layer.lora_dropout) == 0 and not is_half:
        parent, _, child = module.name.rpartition(".")
        setattr(base_model.get_submodule(parent), child, layer.get_base_layer())


def _leave_gates_(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Replace the adapter's config, and our model class once no gates are left."""
    swap_config_(model, adapter, config)
    for module in model.modules():
        if isinstance(module, DynLoraModel) and not any(
            isinstance(c, DynLoraConfig) for c in module.peft_config.values()
        ):
            module.__class__ = LoraModel
    for module in model.modules():
        if isinstance(module, PeftModel) and type(module.base_model) is LoraModel:
            module.peft_type = PeftType.LORA
