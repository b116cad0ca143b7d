"""From gates to plain LoRA: the factors that an export would write are put into the model.

A' = A[keep],  B' = s · (B ⊙ c)[:, keep],  s' = lora_alpha' / r' = 1
"""

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from dynlora._private import without_active_adapter
from dynlora.adapter_files.format import by_module
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.layer import GatedComponents, detach_gate_
from dynlora.gated.model import DynLoraModel
from dynlora.lora.components import find_adapter, find_components, note_layer_rank_, unwrapped
from dynlora.lora.configs import swap_config_
from dynlora.lora.plain import plain_lora


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
    if not any(bool(m.gate.any()) for m in gated if not m.is_dropped):
        raise ValueError(
            "model has no live component: every gate is 0, so the adapter equals the base model. Train "
            "it first (the first optimizer step moves the gates away from 0)."
        )
    fields, tensors = plain_lora(model, adapter, embeddings=False)
    keys, _ = by_module(tensors)
    factors = {n: (tensors[parts["A"]], tensors[parts["B"]]) for n, parts in keys.items()}
    ranks = {m.name: len(factors[m.name][0]) if m.name in factors else 0 for m in gated}
    base_model = unwrapped(model)
    for module in gated:
        if ranks[module.name]:
            _install_(module, *factors[module.name])
    for module in gated:
        if not ranks[module.name]:
            _remove_(base_model, module)
    plain = LoraConfig(**{**fields, "inference_mode": config.inference_mode})
    _leave_gates_(model, adapter, plain)
    return ranks


def _install_(module: GatedComponents, a: Tensor, b: Tensor) -> None:
    """Make the layer a stock LoRA of these factors."""
    layer, adapter = module.layer, module.adapter
    device, is_trained = module.gate.device, module.gate.requires_grad
    new_a, new_b = (nn.Parameter(f.to(device), requires_grad=is_trained) for f in (a, b))
    detach_gate_(layer, adapter)
    layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = new_a, new_b
    layer.use_rslora[adapter], layer.scaling[adapter] = False, 1.0
    note_layer_rank_(layer, adapter, len(a))


def _remove_(base_model: nn.Module, module: GatedComponents) -> None:
    """Take a rank-0 adapter out of its layer, and the layer out of the model if it was the last."""
    layer = module.layer
    detach_gate_(layer, module.adapter)
    with without_active_adapter(layer):  # PEFT would make another one active in this layer only
        layer.delete_adapter(module.adapter)
    if len(layer.lora_dropout) == 0:
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
