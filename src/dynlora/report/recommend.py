"""What a run's ranks say to the next one: a plain LoRA with these ranks, as Python and as YAML."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dynlora.adapter_files.format import scaling_of
from dynlora.adapter_files.plain_config import number, plain_fields
from dynlora.adapter_files.python_source import FILLED_IN
from dynlora.report.layout import group_by_stack, split_name

_AXOLOTL = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules", "exclude_modules": "lora_exclude_modules",
    "target_parameters": "lora_target_parameters", "modules_to_save": "lora_modules_to_save",
    "fan_in_fan_out": "lora_fan_in_fan_out", "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern", "use_rslora": "peft_use_rslora",
    "init_lora_weights": "peft_init_lora_weights", "layers_pattern": "peft_layers_pattern",
    "layers_to_transform": "peft_layers_to_transform",
    "trainable_token_indices": "peft_trainable_token_indices",
}  # fmt: skip
"""axolotl's name of each field of LoraConfig that it takes."""


def mean_rank_by_kind(ranks: Mapping[str, int]) -> dict[str, float]:
    """Mean rank of each kind of module over its layers, highest first.

    >>> mean_rank_by_kind({"layers.0.mlp.up": 4, "layers.1.mlp.up": 1, "head": 3})
    {'head': 3.0, 'mlp.up': 2.5}
    """
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(_kind(name), []).append(rank)
    means = {kind: sum(values) / len(values) for kind, values in kinds.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def same_ranks(ranks: Mapping[str, int], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a LoraConfig that trains exactly these ranks, all else being as in the run.

    Args:
        ranks: final rank by module name, zeros included, one at least above 0.
        lora: fields of the config that the run began with.
    """
    alive = {name: rank for name, rank in ranks.items() if rank}
    bare = {name: () for name in ranks if _is_parameter(name, lora)}
    fields = plain_fields(
        lora,
        alive,
        {name: scaling_of(lora, name) for name in alive},
        dead=[name for name, rank in ranks.items() if not rank and name not in bare],
        parameters=bare,
    )
    return _of_a_start(fields, lora)


def ranks_by_kind(ranks: Mapping[str, int], lora: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of a LoraConfig with one rank a kind of module, as the run distributed its budget.

    Kinds whose mean rounds to 0 are left out. PEFT compares ends of names, and the first pattern that
    fits counts: a kind that ends with another one's name stands before it.

    Returns:
        None where names of kinds cannot say what is adapted: some layer lacks a kind, scalings differ
        within a kind, bare parameters are adapted, or every mean rounds to 0.
    """
    rounded = {kind: round(mean) for kind, mean in mean_rank_by_kind(ranks).items()}
    kept = {kind: rank for kind, rank in rounded.items() if rank > 0}
    scalings: dict[str, set[float]] = {}
    for name in ranks:
        scalings.setdefault(_kind(name), set()).add(scaling_of(lora, name))
    stacks, _ = group_by_stack(ranks)
    is_partial = any(len(row) < len(s.layers) for s in stacks for row in s.rows.values())
    is_mixed = any(len(found) > 1 for found in scalings.values())
    excluded = lora.get("exclude_modules")
    if (
        not kept
        or is_partial
        or is_mixed
        or lora.get("target_parameters")
        or isinstance(excluded, str)
    ):
        return None
    alphas = {kind: number(scalings[kind].copy().pop() * rank) for kind, rank in kept.items()}
    common = max(sorted(set(kept.values())), key=list(kept.values()).count)
    alpha = max(sorted(set(alphas.values())), key=list(alphas.values()).count)
    special = {k for k, rank in kept.items() if (rank, alphas[k]) != (common, alpha)}
    shadowed = {kind for kind in kept if _ends_with_any(kind, special)}
    order = sorted(special | shadowed, key=lambda k: (-len(k), k))
    dropped = [k for k, rank in rounded.items() if rank == 0 and _ends_with_any(k, kept)]
    fields = {
        **lora,
        "r": common,
        "lora_alpha": alpha,
        "target_modules": sorted(kept),
        "exclude_modules": sorted({*(excluded or ()), *dropped}) or None,
        "rank_pattern": {kind: kept[kind] for kind in order},
        "alpha_pattern": {kind: alphas[kind] for kind in order},
        "use_rslora": False,
    }
    return _of_a_start(fields, lora)


def _of_a_start(fields: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only a finished adapter's config says; the start is that of the run."""
    kept = {**fields, "init_lora_weights": lora.get("init_lora_weights", True)}
    empty: tuple[Any, ...] = (None, {}, [])
    is_default = {"use_rslora": False, "init_lora_weights": True}
    return {
        name: value
        for name, value in kept.items()
        if name not in FILLED_IN and value not in empty and is_default.get(name) is not value
    }


def as_axolotl(fields: Mapping[str, Any]) -> str:
    """The same for axolotl's YAML; a comment names what it has no key for.

    >>> print(as_axolotl({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "rank_pattern": {"q": 2}}))
    adapter: lora
    lora_r: 4
    lora_alpha: 8
    lora_rank_pattern:
      "q": 2
    """
    known = {_AXOLOTL[name]: value for name, value in fields.items() if name in _AXOLOTL}
    lines = ["adapter: lora"]
    for name, value in known.items():
        if isinstance(value, dict):
            lines += [
                f"{name}:",
                *(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()),
            ]
        elif isinstance(value, list):
            lines += [f"{name}:", *(f"  - {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    missing = [n for n in fields if n not in _AXOLOTL and n != "task_type"]
    alphas = [fields.get("lora_alpha"), *fields.get("alpha_pattern", {}).values()]
    if any(isinstance(alpha, float) for alpha in alphas):
        missing.append("alphas that are not whole numbers")
    return "\n".join([*lines, *([f"# not in axolotl: {', '.join(missing)}"] if missing else [])])


def _kind(name: str) -> str:
    parts = split_name(name)
    return parts[2] if parts else name


def _is_parameter(name: str, lora: Mapping[str, Any]) -> bool:
    return any(f".{name}".endswith(f".{t}") for t in lora.get("target_parameters") or ())


def _ends_with_any(kind: str, others: Iterable[str]) -> bool:
    return any(kind.endswith(f".{other}") for other in others)
