"""Fields of PEFT's LoraConfig from a recipe's options."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.adapter_files.plain_config import exact_key
from dynlora.lora.follow import AdapterStart
from dynlora_lab.methods.adapted import Target
from dynlora_lab.methods.options import AdapterOptions

_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


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


def ranked_fields(
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
        "target_modules": joined_names(alive),
        "rank_pattern": {exact_key(name): rank for name, rank in alive.items()},
        "alpha_pattern": {exact_key(name): options.alpha_at(rank) for name, rank in alive.items()},
    }


def joined_names(names: Iterable[str]) -> str:
    """A regular expression for exactly these modules."""
    return "|".join(re.escape(name) for name in names)


def component_sizes(options: AdapterOptions, target: Target) -> dict[str, int]:
    """Parameters of one component of each module that would be adapted, by name.

    Counted on a model without weights; the target's own is left as it is.
    """
    with torch.device("meta"):
        shape = type(target.model)(target.model.config)
    config = LoraConfig(r=1, **shared_fields(options, target, rank=1))
    return AdapterStart.of(get_peft_model(shape, config)).sizes


def placed_ranks(options: AdapterOptions, target: Target) -> dict[str, int]:
    """Ranks of a LoRA on a part of ``target_modules`` with the parameters of ``target_r`` on all of them.

    The rank that fits on every module of the part, and what is left as one component more on modules
    spread evenly, to the nearest component.

    Raises:
        ValueError: the part is empty.
    """
    sizes = component_sizes(options, target)
    in_attention = options.placement == "attention"
    part = {n: s for n, s in sizes.items() if bool(_ATTENTION.search(n)) == in_attention}
    if not part:
        raise ValueError(
            f"adapter.placement={options.placement!r} leaves no module: target_modules selects "
            f"{', '.join(list(sizes)[:2])} and so on. Leave it out, or change target_modules."
        )
    whole = sum(part.values())
    rank, left = divmod(int(options.target_r * sum(sizes.values())), whole)
    ranks = dict.fromkeys(part, rank)
    due = whole * min(part.values()) // 2
    for name, size in part.items():
        due += left * size
        if due >= whole * size:
            ranks[name] += 1
            due -= whole * size
    return ranks


def _joined(excluded: list[str] | None, target: Target) -> list[str] | None:
    return [*(excluded or ()), *target.head] or None
