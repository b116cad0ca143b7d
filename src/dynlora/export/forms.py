"""The two forms of a plain LoRA: every module with its own rank, or all with one, padded with zeros."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora.adapter_files.format import PREFIX, factor_key
from dynlora.adapter_files.plain_config import plain_fields
from dynlora.adapter_files.updates import Adapter, Update, without_zeros

PAD_STEPS = (8, 16, 32, 64, 128, 256, 512)
"""Ranks that servers with one rank an adapter take (vLLM's list of allowed maximum ranks, without 1
and 320; LoRAX and TGI want multiples of 8)."""

Plain = tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]
"""Fields of adapter_config.json, tensors by their key, and the pruned modules that are left out."""


def ragged(adapter: Adapter) -> Plain:
    """Each module with its own rank and scaling 1, without components that are 0 and pruned modules."""
    return _plain(without_zeros(adapter), lists_only=False)


def uniform(adapter: Adapter, pruned: Mapping[str, Update], *, rank: int | None = None) -> Plain:
    """All modules with one rank and scaling 1, no patterns; zeros fill up, in pruned modules too.

    Args:
        adapter: what to write.
        pruned: an update of zeros for every layer of every module in ``adapter.pruned``, by name.
        rank: the common rank; None takes the next of ``PAD_STEPS``.

    Raises:
        ValueError: ``rank`` is below the largest rank.
    """
    live = without_zeros(dataclasses.replace(adapter, pruned=()))
    largest = max(update.rank for update in live.updates)
    rank = padded_rank(largest) if rank is None else rank
    if rank < largest:
        raise ValueError(
            f"pad_to={rank} is below the largest rank of the adapter, {largest}: padding only adds zero "
            f"components. Take {padded_rank(largest)}, or 'auto'."
        )
    by_name = {u.name: u.taken(torch.arange(0)) for u in adapter.updates} | dict(pruned)
    by_name |= {u.name: u for u in live.updates}
    updates = tuple(u.padded(rank) for _, u in sorted(by_name.items()))
    return _plain(dataclasses.replace(live, updates=updates, pruned=()), lists_only=True)


def padded_rank(largest: int) -> int:
    """The next of ``PAD_STEPS`` that holds ``largest``; beyond them the next multiple of 64.

    >>> [padded_rank(r) for r in (1, 8, 9, 600)]
    [8, 8, 16, 640]
    """
    return next((step for step in PAD_STEPS if step >= largest), -(-largest // 64) * 64)


def _plain(adapter: Adapter, *, lists_only: bool) -> Plain:
    updates = [u.unscaled() for u in adapter.updates]
    ranks = {u.group: u.rank for u in updates}
    config = plain_fields(
        adapter.stored,
        ranks,
        dict.fromkeys(ranks, 1.0),
        dead=adapter.pruned,
        parameters={u.group: u.parameters for u in updates if u.parameters},
        lists_only=lists_only,
    )
    tensors = _others(adapter)
    for update in updates:
        tensors[update.a_key], tensors[update.b_key] = update.a, update.b
    return config, tensors, adapter.pruned


def _others(adapter: Adapter) -> dict[str, Tensor]:
    """Heads, biases and tokens by their key in the written file.

    PEFT names a weight of an adapted module with ``.base_layer``, so that of a module that is adapted in
    one form only has two names. The bias of B is scaled as B is.
    """
    depth: dict[str, int] = {}
    for update in adapter.updates:
        plain = update.name.replace(".base_layer", "")
        depth[plain] = depth.get(plain, 0) + 1
    scalings = {factor_key(u.name, "B").removesuffix(".weight"): u.scaling for u in adapter.updates}
    found = {}
    for key, tensor in adapter.others.items():
        owner = key.removesuffix(".bias")
        if owner in scalings:
            found[key] = tensor * scalings[owner]
        else:
            is_of_module = key.endswith((".weight", "bias")) and ".lora_" not in key
            found[_wrapped(key, depth) if is_of_module else key] = tensor
    return found


def _wrapped(key: str, depth: Mapping[str, int]) -> str:
    """A key with ``.base_layer`` after each module that is adapted, as often as it is, and nowhere else.

    >>> _wrapped("base_model.model.h.q.base_layer.bias", {}), _wrapped(PREFIX + "h.q.bias", {"h.q": 1})
    ('base_model.model.h.q.bias', 'base_model.model.h.q.base_layer.bias')
    """
    parts = key.removeprefix(PREFIX).replace(".base_layer", "").split(".")
    written: list[str] = []
    for i, part in enumerate(parts):
        written += [part, *["base_layer"] * depth.get(".".join(parts[: i + 1]), 0)]
    return PREFIX + ".".join(written)
