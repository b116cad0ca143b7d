"""Start from a plain LoRA: its components become gated ones, and training shrinks it."""

import dataclasses
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from dynlora.adapter.components import configs_of, find_gated_layers, unwrapped
from dynlora.adapter.config import DYNLORA, DynLoraConfig
from dynlora.adapter.fold import swap_config_
from dynlora.adapter.guard import expect_allocator
from dynlora.adapter.layers import attach_gate_
from dynlora.adapter.tuner import DynLoraModel


def warm_start_(
    model: nn.Module, adapter: str | None = None, *, target_r: float, **fields: Any
) -> DynLoraConfig:
    """Turn a trainable plain LoRA into a DynLora adapter with the same function, in place.

    "Shrink my r=64 LoRA to a mean rank of 16": load it with stock PEFT, call this, train on with
    DynLoraCallback or RankAllocator. The update of every module is first rotated into its principal
    components (its singular vectors, which changes nothing), so that what is pruned is what matters
    least; all gates start at 1.

    Args:
        model: a model with a plain LoRA adapter, loaded with ``is_trainable=True``.
        adapter: which one; may be left out if there is only one.
        target_r: mean live rank per module at the end; see DynLoraConfig.
        fields: other fields of DynLoraConfig's own (prune_start, dem_weight, …). The LoRA's fields
            are kept. ``importance`` is ``share`` if not given: in a trained LoRA gradients are small,
            and sensitivity tells little.

    Returns:
        The adapter's new config; ``init_r`` is the LoRA's rank.

    Raises:
        ValueError: there is no such plain LoRA, it uses a variant that has no gated form, or a field
            is out of range. The model is then unchanged.
    """
    adapter, plain = _plain_adapter(model, adapter)
    own = {f.name for f in dataclasses.fields(DynLoraConfig)}
    kept = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.init}
    kept = {k: v for k, v in kept.items() if k in own and k not in {"r", "peft_type"}}
    kept["init_lora_weights"] = True  # how the LoRA once started is history
    fields = {"importance": "share", **fields}
    config = DynLoraConfig(**kept, init_r=plain.r, target_r=target_r, **fields)
    for _, layer in _lora_layers(model, adapter):
        gate = attach_gate_(layer, adapter, identity=False, init_std=None, fused=config.fused)
        if config.target_r < layer.r[adapter]:
            expect_allocator(layer, adapter)
        gate.requires_grad_(True)
    for gated in find_gated_layers(model, adapter):
        a, b, _ = gated.parameters
        rotated_a, rotated_b = principal_components(a.detach(), b.detach())
        a.data.copy_(rotated_a)
        b.data.copy_(rotated_b)
    accept_dynlora_(model)
    swap_config_(model, adapter, config)
    return config


def accept_dynlora_(model: nn.Module) -> None:
    """Let a PeftModel with plain LoRA adapters take DynLora adapters beside them, in place.

    A PeftModel holds adapters of one method, and finalizing the last dynamic adapter makes it a plain
    LoRA model again. To train one dynamic adapter after the other, call this before
    ``model.add_adapter(name, DynLoraConfig(...))`` or ``model.load_adapter(...)``. The adapters that are
    there stay as they are, and ``finalize_`` undoes it.

    Args:
        model: a PeftModel, wrapped or not.

    Raises:
        ValueError: the model holds adapters of another method, or no PeftModel is in it.
    """
    kinds = sorted({type(c).__name__ for c in configs_of(model).values()})
    if not kinds or not all(isinstance(c, LoraConfig) for c in configs_of(model).values()):
        raise ValueError(
            f"model={type(model).__name__} holds {kinds or 'no adapter'}: only LoRA adapters can stand "
            "beside DynLora ones. Wrap a model without adapters with get_peft_model."
        )
    for module in model.modules():
        if isinstance(module, PeftModel):
            module.peft_type = DYNLORA
        if type(module) is LoraModel:
            module.__class__ = DynLoraModel


def principal_components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A whose components are its singular triplets, largest first.

    B A = U S Vᵀ from the QR decompositions of B and Aᵀ and an SVD of their r x r core, in float64;
    B' = U √S, A' = √S Vᵀ. Components beyond the rank of the product are 0.

    Args:
        a: (rank, in, ...).
        b: (out, rank, ...).

    Returns:
        A' and B', the shapes and dtypes of ``a`` and ``b``.

    >>> a, b = principal_components(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0])))
    >>> (b @ a).round(decimals=3)
    tensor([[1., 0.],
            [0., 4.]])
    >>> (a.norm(dim=1) * b.norm(dim=0)).round(decimals=3)
    tensor([4., 1.])
    """
    rank = a.shape[0]
    q_b, r_b = torch.linalg.qr(b.flatten(1).double())
    q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    new_a = (vh * s.sqrt().unsqueeze(1)) @ q_a.T
    new_b = q_b @ (u * s.sqrt())
    gap = rank - s.numel()
    new_a = torch.cat([new_a, new_a.new_zeros(gap, new_a.shape[1])])
    new_b = torch.cat([new_b, new_b.new_zeros(new_b.shape[0], gap)], dim=1)
    return new_a.reshape(a.shape).to(a.dtype), new_b.reshape(b.shape).to(b.dtype)


def _plain_adapter(model: nn.Module, adapter: str | None) -> tuple[str, LoraConfig]:
    configs = configs_of(model)
    plain = {n: c for n, c in configs.items() if type(c) is LoraConfig}
    if adapter is None and len(plain) == 1:
        adapter = next(iter(plain))
    if adapter is None or adapter not in plain:
        raise ValueError(
            f"adapter={adapter!r} must name a plain LoRA adapter of the model: {sorted(plain)} of "
            f"{sorted(configs)}. Load one with PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    if len(configs) > 1:
        raise ValueError(
            f"model holds the adapters {sorted(configs)}: PEFT does not mix methods in one model. Load "
            f"only {adapter!r}."
        )
    weights = [p for _, layer in _lora_layers(model, adapter) for p in layer.lora_A.parameters()]
    if weights and not any(p.requires_grad for p in weights):
        raise ValueError(
            f"adapter={adapter!r} is not trainable: load it with PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)."
        )
    return adapter, plain[adapter]


def _lora_layers(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, lora.LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]
