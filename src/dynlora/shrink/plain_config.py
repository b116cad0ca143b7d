"""The config of a cut adapter: ranks and alphas by module, modules of rank 0 left out."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from dynlora.shrink.source import Adapter, Update

_NOT_PRINTED = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
"""Fields that PEFT fills in itself, or that are printed first."""


def cut_config(adapter: Adapter, ranks: Sequence[int]) -> dict[str, Any]:
    """``adapter_config.json`` of the adapter at other ranks; every scaling stays what it was.

    r is the largest rank, because servers that read no patterns size their buffers by it. The start is
    made PEFT's own: a finished adapter needs no other, and some write to the base.

    Args:
        adapter: as it was read.
        ranks: of its updates, in their order; 0 leaves a module out.
    """
    by_group = {u.group: (u, rank) for u, rank in zip(adapter.updates, ranks, strict=True)}
    alive = {group: pair for group, pair in by_group.items() if pair[1]}
    largest = max(rank for _, rank in alive.values())
    scaling = Counter(u.scaling for u, _ in alive.values()).most_common(1)[0][0]
    alphas = {group: _number(u.scaling * rank) for group, (u, rank) in alive.items()}
    common = _number(scaling * largest)
    return adapter.stored | {
        "r": largest,
        "lora_alpha": common,
        "rank_pattern": {_key(u): rank for u, rank in alive.values() if rank != largest},
        "alpha_pattern": {
            _key(u): alphas[group] for group, (u, _) in alive.items() if alphas[group] != common
        },
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "loftq_config": {},
        **_target_fields(
            adapter, [g for g, (_, rank) in by_group.items() if not rank], list(alive)
        ),
    }


def config_source(config: LoraConfig) -> str:
    """Python that makes a ``LoraConfig`` of the same ranks, scalings and modules.

    It names what differs from PEFT's defaults, and leaves out what PEFT fills in.
    """
    default = LoraConfig().to_dict()
    fields: dict[str, Any] = {}
    if config.task_type is not None:
        fields["task_type"] = str(getattr(config.task_type, "value", config.task_type))
    names = ["r", "lora_alpha"]
    stored = config.to_dict()
    names += [n for n in stored if n not in _NOT_PRINTED and n not in names]
    for name in names:
        value = sorted(stored[name]) if isinstance(stored[name], set) else stored[name]
        if name in {"r", "lora_alpha"} or value != default.get(name):
            fields[name] = value
    lines = [f"    {name}={_literal(value)}," for name, value in fields.items()]
    return "\n".join(["LoraConfig(", *lines, ")"])


def _literal(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "\n".join(["{", *(f"        {k!r}: {v!r}," for k, v in value.items()), "    }"])
    if isinstance(value, list) and len(repr(value)) > 50:
        return "\n".join(["[", *(f"        {v!r}," for v in value), "    ]"])
    return repr(value)


def _key(update: Update) -> str:
    """The pattern key that matches this module, or this module's adapted parameters, and nothing else.

    PEFT reads it as a regular expression. Which of several parameters of a module is nested where, the
    file does not tell, so one key means them all.
    """
    key = "^" + re.escape(update.group)
    if not update.parameters:
        return key
    names = [re.escape(p) for p in update.parameters]
    return rf"{key}\.{names[0]}" if len(names) == 1 else rf"{key}\.(?:{'|'.join(names)})"


def _number(alpha: float) -> float | int:
    """An int where it is one but for rounding: configs say 8, not 8.000000000000002."""
    whole = round(alpha)
    return whole if abs(alpha - whole) <= 1e-12 * max(1.0, abs(alpha)) else alpha


def _target_fields(adapter: Adapter, dead: list[str], alive: list[str]) -> dict[str, Any]:
    """``target_modules`` and its companions that match the kept modules and none that were dropped.

    The trained list stays where it can, with dropped modules excluded by their full names. PEFT compares
    ends of names, so a full name may also mean a longer one; a regular expression is the last resort,
    because some servers read lists only.
    """
    if not dead:
        return {}
    bare = {u.group for u in adapter.updates if u.parameters}
    modules = [name for name in alive if name not in bare]
    targets, excluded = adapter.stored.get("target_modules"), adapter.stored.get("exclude_modules")
    every_layer = {"layers_to_transform": None, "layers_pattern": None}
    if not modules:  # bare parameters only; None would let PEFT pick modules by the architecture
        return {"target_modules": [], "exclude_modules": None, **every_layer}
    candidates: list[dict[str, Any]] = []
    if not isinstance(excluded, str):
        candidates.append({"exclude_modules": sorted({*(excluded or ()), *dead})})
    candidates.append(
        {"target_modules": sorted(modules), "exclude_modules": sorted(dead), **every_layer}
    )
    one_of = "|".join(re.escape(name) for name in sorted(modules))
    kept_names = {"target_modules": targets} | {n: adapter.stored.get(n) for n in every_layer}
    for fields in candidates:
        trial = LoraConfig(**kept_names | fields)
        if not any(check_target_module_exists(trial, name) for name in dead) and all(
            check_target_module_exists(trial, name) for name in modules
        ):
            return fields
    return {"target_modules": f"^(?:{one_of})$", "exclude_modules": None, **every_layer}
