"""PEFT's LoRA: at the final rank, at the initial one, and cut from the one to the other by SVD."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dynlora.adapter_files.plain_config import exact_key
from dynlora.allocation import Budget, select_components, target_cost
from dynlora.allocator.masks import Masks
from dynlora.lora.adapter import LoraAdapter
from dynlora.lora.components import LoraComponents
from dynlora.lora.follow import AdapterStart
from dynlora_lab.methods.adapted import Adapted, Target, trainable_beside
from dynlora_lab.methods.options import AdapterOptions


def shared_fields(options: AdapterOptions, target: Target, *, rank: float) -> dict[str, Any]:
    """Fields of LoraConfig that mean the same for every method made of it.

    Args:
        options: of the recipe.
        target: the model that is adapted.
        rank: that the adapter starts with; ``lora_alpha`` follows it, so that the scaling is one.
    """
    excluded = options.exclude_modules
    return {
        "target_modules": options.target_modules,
        "exclude_modules": excluded if isinstance(excluded, str) else _joined(excluded, target),
        "modules_to_save": target.head or None,
        "lora_alpha": options.alpha_at(rank),
        "lora_dropout": options.lora_dropout,
        "task_type": target.task_type,
    }


def lora(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA with every rank at the final budget, or with ``ranks``; scaling lora_alpha / target_r.

    Raises:
        ValueError: ``target_r`` is not a whole number, or ``ranks`` names what the model does not have.
    """
    if options.ranks is None:
        return _plain(options, target, whole_rank(options, "lora"))
    fields = shared_fields(options, target, rank=options.target_r)
    fields |= _ranked_fields(options, options.ranks, target.model)
    return _trained(get_peft_model(target.model, LoraConfig(**fields)), target)


def lora_initial(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at the rank that the pruning methods start with, so larger than theirs at the end."""
    return _plain(options, target, options.start_r)


def lora_svd(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at the initial rank; after training the model's largest singular values stay.

    The control for "train big, truncate once": see ``truncate_``.
    """
    made = _plain(options, target, options.start_r)
    final: dict[str, int] = {}

    def cut() -> None:
        final.update(truncate_(made.model, target_r=options.target_r, budget=options.budget))

    return dataclasses.replace(
        made,
        finish=cut,
        ranks=lambda: final or made.ranks(),
        fits_from=lambda total_steps: total_steps + 1,  # cut after the last of them
    )


@torch.no_grad()
def truncate_(
    model: nn.Module, *, target_r: float, budget: Budget = "components"
) -> dict[str, int]:
    """Cut a plain LoRA to its largest singular values, in place.

    All modules' updates are compared together: what stays is, in components, the best approximation in
    the Frobenius norm, and in parameters the greedy one, by square of the singular value per parameter.

    Args:
        model: with one trainable plain LoRA.
        target_r: mean rank per module to keep.
        budget: what it counts; see ``dynlora.allocation.Settings``.

    Returns:
        Rank by module name, zeros included.
    """
    start = AdapterStart.of(model)
    for module in start.modules:
        _to_singular_triplets_(module)
    values = [_squared_norms(module) for module in start.modules]
    in_components = budget == "components"
    sizes = [1 if in_components else size for size in start.sizes.values()]
    costs = [size for size, value in zip(sizes, values, strict=True) for _ in range(len(value))]
    keep = select_components(
        torch.cat(values),
        torch.tensor(costs),
        target_cost(target_r, sizes, in_components=in_components),
    )
    for module, live in zip(start.modules, keep.split([len(v) for v in values]), strict=True):
        module.live.copy_(live)
    # a module that cannot lose its adapter keeps a component, which must be 0
    Masks(start.modules).apply_()
    return LoraAdapter(model, start).finish_()


def _to_singular_triplets_(module: LoraComponents) -> None:
    """Replace the factors of each pair, in place, by √σ u and √σ v of their product, largest first.

    A layer too narrow for as many triplets as components keeps zeros in the last ones.
    """
    for a, b in module.pairs:
        rows = a.vectors(a.parameter.detach())  # views: (copies, rank, length)
        columns = b.vectors(b.parameter.detach())
        right, right_core = torch.linalg.qr(rows.double().mT)
        left, left_core = torch.linalg.qr(columns.double().mT)
        u, sigma, vt = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
        root = sigma.sqrt().unsqueeze(2)
        for vectors, turned in (rows, root * (right @ vt.mT).mT), (columns, root * (left @ u).mT):
            vectors.zero_()
            vectors[:, : turned.shape[1]].copy_(turned)


def _squared_norms(module: LoraComponents) -> Tensor:
    """‖s b aᵀ‖² of each component, (rank,), summed over the pairs that share it."""
    norms = [
        a.vectors(a.parameter).double().norm(dim=2) * b.vectors(b.parameter).double().norm(dim=2)
        for a, b in module.pairs
    ]
    return (module.scaling or 1.0) ** 2 * sum(norm.square().sum(0) for norm in norms)


def _plain(options: AdapterOptions, target: Target, rank: int) -> Adapted:
    config = LoraConfig(r=rank, **shared_fields(options, target, rank=rank))
    return _trained(get_peft_model(target.model, config), target)


def _trained(model: nn.Module, target: Target) -> Adapted:
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        ranks=lambda: lora_ranks(model),
    )


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
    return {
        "target_modules": "|".join(re.escape(name) for name in alive),
        "rank_pattern": {exact_key(name): rank for name, rank in alive.items()},
        "alpha_pattern": {exact_key(name): options.alpha_at(rank) for name, rank in alive.items()},
    }


def _joined(excluded: list[str] | None, target: Target) -> list[str] | None:
    return [*(excluded or ()), *target.head] or None
