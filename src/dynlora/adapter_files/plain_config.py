"""The config of an adapter at other ranks: as fields, and as Python to be pasted."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynlora.adapter_files.format import is_targeted


def exact_key(name: str) -> str:
    """The pattern key that means this module and no other; PEFT reads it as a regular expression."""
    return "^" + re.escape(name)


def plain_fields(
    fields: Mapping[str, Any],
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    *,
    dead: Sequence[str] = (),
    parameters: Mapping[str, Sequence[str]] | None = None,
    lists_only: bool = False,
) -> dict[str, Any]:
    """``fields`` changed so that each module has its rank and scaling.

    r is the largest rank, because servers that read no patterns size their buffers by it. The start is
    PEFT's own: a finished adapter needs no other, and some write to the base.

    Args:
        fields: of the config that the modules were adapted by.
        ranks: of each adapted module, 1 or more.
        scalings: of each adapted module.
        dead: modules of rank 0.
        parameters: names of adapted bare parameters by module.
        lists_only: whether target modules must be a list, as some servers want.
    """
    parameters = parameters or {}
    largest = max(ranks.values())
    scaling = Counter(scalings[name] for name in ranks).most_common(1)[0][0]
    common = number(scaling * largest)
    alphas = {name: number(scalings[name] * rank) for name, rank in ranks.items()}
    keys = {name: _key(name, parameters.get(name, ())) for name in ranks}
    names = [name for name in ranks if name not in parameters]
    return {
        **fields,
        "r": largest,
        "lora_alpha": common,
        "rank_pattern": {keys[n]: rank for n, rank in ranks.items() if rank != largest},
        "alpha_pattern": {keys[n]: alphas[n] for n in ranks if alphas[n] != common},
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "loftq_config": {},
        **target_fields(fields, names, dead, lists_only=lists_only),
    }


def _key(name: str, parameters: Sequence[str]) -> str:
    """One key for all adapted parameters of a module: the file does not tell which is nested where."""
    if not parameters:
        return exact_key(name)
    names = [re.escape(p) for p in parameters]
    one_of = names[0] if len(names) == 1 else f"(?:{'|'.join(names)})"
    return rf"{exact_key(name)}\.{one_of}"


def number(alpha: float) -> float | int:
    """An int where it is one but for rounding: configs say 8, not 8.000000000000002."""
    whole = round(alpha)
    return whole if abs(alpha - whole) <= 1e-12 * max(1.0, abs(alpha)) else alpha


def target_fields(
    fields: Mapping[str, Any],
    alive: Sequence[str],
    dead: Sequence[str],
    *,
    others: Sequence[str] = (),
    lists_only: bool = False,
) -> dict[str, Any]:
    """``target_modules`` and its companions that match the living modules, none of the dead or others.

    The trained list stays where it can, with dead modules excluded by their full names. PEFT compares
    ends of names, so a full name may also mean a longer one; a regular expression is the last resort,
    because some servers read lists only.
    """
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    layers = {name: fields.get(name) for name in ("layers_to_transform", "layers_pattern")}
    every_layer = dict.fromkeys(layers)
    candidates: list[dict[str, Any]] = []
    if not alive:  # bare parameters only; None would let PEFT pick modules by the architecture
        return {"target_modules": [], "exclude_modules": None, **every_layer} if dead else {}
    keeps_targets = not (lists_only and isinstance(targets, str))
    unwanted = [*dead, *others]
    if not dead and keeps_targets and _fits(fields, alive, unwanted):
        return {}
    if keeps_targets and not isinstance(excluded, str):
        unused = sorted({*(n for n in excluded or () if n not in alive), *dead}) or None
        candidates.append({"target_modules": targets, "exclude_modules": unused, **layers})
    candidates.append(
        {"target_modules": sorted(alive), "exclude_modules": sorted(dead) or None, **every_layer}
    )
    for trial in candidates:
        if _fits(trial, alive, unwanted):
            return trial
    one_of = "|".join(re.escape(name) for name in sorted(alive))
    return {"target_modules": f"^(?:{one_of})$", "exclude_modules": None, **every_layer}


def _fits(fields: Mapping[str, Any], alive: Iterable[str], dead: Iterable[str]) -> bool:
    return all(is_targeted(fields, n) for n in alive) and not any(
        is_targeted(fields, n) for n in dead
    )


_FILLED_IN = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config",
})  # fmt: skip
"""Fields of LoraConfig that PEFT fills in by itself."""

_ASSUMED = {
    "bias": "none", "init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16,
}  # fmt: skip
"""Defaults of LoraConfig that are neither empty nor False; r and lora_alpha are always told."""


def told_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of LoraConfig's fields that must be told: not what PEFT fills in or assumes.

    >>> told_fields({"r": 8, "bias": "none", "lora_dropout": 0.0, "peft_type": "LORA", "eva_config": None})
    {'r': 8}
    """
    return {
        name: value
        for name, value in fields.items()
        if name not in _FILLED_IN
        and value not in (None, {}, [])
        and value != _ASSUMED.get(name, False)
    }


def as_python(fields: Mapping[str, Any]) -> str:
    """``LoraConfig(...)`` with one argument a line, to be pasted; without what PEFT fills in or assumes.

    >>> print(as_python({"r": 4, "target_modules": ["q"], "rank_pattern": {"q": 2}, "eva_config": None}))
    LoraConfig(
        r=4,
        target_modules=['q'],
        rank_pattern={
            'q': 2,
        },
    )
    """
    told = told_fields(fields)
    names = sorted(told, key=lambda name: name not in {"task_type", "r", "lora_alpha"})
    lines = [f"    {name}={_literal(told[name])}," for name in names]
    return "\n".join(["LoraConfig(", *lines, ")"])


def _literal(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "\n".join(["{", *(f"        {k!r}: {v!r}," for k, v in value.items()), "    }"])
    if isinstance(value, list) and len(repr(value)) > 50:
        return "\n".join(["[", *(f"        {v!r}," for v in value), "    ]"])
    return repr(value)
