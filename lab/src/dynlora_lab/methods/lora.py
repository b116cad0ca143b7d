"""``lora`` and ``lora-svd``: PEFT's LoRA at the final rank, and one cut to it by SVD afterwards."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from dynlora.adapter.components import find_gated_layers
from dynlora.adapter.fold import finalize_
from dynlora.adapter.patterns import module_key
from dynlora.adapter.warm_start import warm_start_
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.allocation import select_components, target_components
from dynlora_lab.methods.adapted import Adapted, Target, trainable_beside
from dynlora_lab.methods.options import AdapterOptions


def shared_fields(options: AdapterOptions, target: Target) -> dict[str, Any]:
    """Fields of LoraConfig that mean the same for every method made of it."""
    excluded = options.exclude_modules
    return {
        "target_modules": options.target_modules,
        "exclude_modules": excluded if isinstance(excluded, str) else _joined(excluded, target),
        "modules_to_save": target.head or None,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "task_type": target.task_type,
    }


def lora(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA with every rank at the final budget, or with ``ranks``; scaling lora_alpha / target_r.

    Raises:
        ValueError: ``target_r`` is not a whole number, or ``ranks`` names what the model does not have.
    """
    fields = shared_fields(options, target)
    if options.ranks is None:
        config = LoraConfig(r=whole_rank(options, "lora"), **fields)
    else:
        config = LoraConfig(**fields | _ranked_fields(options, options.ranks, target.model))
    model = get_peft_model(target.model, config)
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        ranks=lambda: lora_ranks(model),
    )


def lora_svd(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at the initial rank; after training the model's largest singular values stay.

    The control for "train big, truncate once": of the singular values of all modules' updates
    together the final budget's largest are kept, the best approximation in the Frobenius norm.
    """
    config = LoraConfig(r=options.start_r, **shared_fields(options, target))
    model = get_peft_model(target.model, config)
    final: dict[str, int] = {}
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        finish=lambda: final.update(truncate_(model, target_r=options.target_r)),
        ranks=lambda: final or lora_ranks(model),
        fits_from=lambda total_steps: total_steps + 1,  # cut after the last of them
    )


@torch.no_grad()
def truncate_(model: nn.Module, *, target_r: float) -> dict[str, int]:
    """Cut a plain LoRA to ``target_r`` · modules components, in place.

    Args:
        model: with one trainable plain LoRA.
        target_r: mean rank per module to keep.

    Returns:
        Rank by module name, zeros included.
    """
    warm_start_(model, target_r=target_r)  # rotates each update into its singular triplets
    layers = find_gated_layers(model, "default")
    sizes = []
    for gated in layers:
        a, b, gate = gated.parameters
        sizes.append(
            gated.scaling * gate * a.flatten(1).norm(dim=1) * b.movedim(1, 0).flatten(1).norm(dim=1)
        )
    budget = target_components(target_r, len(layers))
    keep = select_components(torch.cat(sizes).float(), budget)
    for gated, live in zip(layers, keep.split([s.numel() for s in sizes]), strict=True):
        gated.live.copy_(live)
        gated.gate.mul_(live)
    return finalize_(model)


def lora_ranks(model: nn.Module) -> dict[str, int]:
    """Rank of the adapter ``default`` by module name, of a plain LoRA."""
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in getattr(module, "r", {})
    }


def whole_rank(options: AdapterOptions, method: str) -> int:
    """``target_r`` for a method that gives every module the same rank.

    Raises:
        ValueError: it is not a whole number.
    """
    if options.target_r != int(options.target_r):
        raise ValueError(
            f"adapter.target_r={options.target_r} must be a whole number for {method}: every module "
            "has the same rank."
        )
    return int(options.target_r)


def _ranked_fields(
    options: AdapterOptions, ranks: Mapping[str, int], model: nn.Module
) -> dict[str, Any]:
    """Fields of a LoraConfig with one rank a module, and the scaling of a LoRA of rank target_r in all."""
    known = {name for name, _ in model.named_modules()}
    for name, rank in ranks.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1) or sorted(known)[-1:]
            raise ValueError(
                f"adapter.ranks names {name!r}, which the model does not have; it has {nearest[0]!r}."
            )
        if rank < 0:
            raise ValueError(f"adapter.ranks={{{name!r}: {rank}}} must hold ranks of at least 0.")
    alive = {name: rank for name, rank in ranks.items() if rank > 0}
    scaling = options.lora_alpha / options.target_r
    return {
        "target_modules": "|".join(re.escape(name) for name in alive),
        "rank_pattern": {module_key(name): rank for name, rank in alive.items()},
        "alpha_pattern": {module_key(name): scaling * rank for name, rank in alive.items()},
    }


def _joined(excluded: list[str] | None, target: Target) -> list[str] | None:
    return [*(excluded or ()), *target.head] or None
