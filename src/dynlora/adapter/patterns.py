"""Configs that describe ragged ranks: which modules, which rank and which alpha, for any loader.

PEFT reads pattern keys as regular expressions and refuses rank 0, so names are anchored and escaped
and modules of rank 0 are excluded.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from dynlora.adapter.components import GatedLayer, unwrapped
from dynlora.adapter.config import DynLoraConfig, plain_lora_fields
from dynlora.adapter.flat_shards import without_wrappers

OUT_PROJECTION = ".base_layer.out_proj"
"""Where PEFT keeps the second half of MultiheadAttention, which no pattern can name."""


def module_key(name: str) -> str:
    """The pattern key that matches one module only."""
    return "^" + re.escape(name)


def with_one_component(config: DynLoraConfig, name: str) -> DynLoraConfig:
    """A copy of ``config`` by which PEFT, which refuses rank 0, can build module ``name``."""
    built = copy.copy(config)
    built.rank_pattern = {module_key(name): 1}
    return built


def plain_config(model: nn.Module, config: DynLoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The LoraConfig of a finished adapter: scaling 1 in every module, rank-0 modules left out.

    Args:
        model: the model whose module names the patterns must tell apart.
        config: the adapter's config in training.
        ranks: live rank by module name, zeros included.

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
    pattern = {module_key(n): r for n, r in ranks.items() if 0 < r < largest}
    fields = plain_lora_fields(config) | {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,
        **target_fields(model, config, ranks),
    }
    return LoraConfig(**fields)


def target_fields(
    model: nn.Module, config: DynLoraConfig, ranks: Mapping[str, int]
) -> dict[str, Any]:
    """``target_modules`` and its companions that match exactly the modules of rank 1 or more.

    The user's own list of names is kept where it can be, with rank-0 modules in ``exclude_modules``.
    A regular expression is the last resort, because some servers read only lists.
    """
    alive = sorted(n for n, r in ranks.items() if r > 0)
    dead = sorted(n for n, r in ranks.items() if r == 0)
    own_layers = {
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
    }
    all_layers = dict.fromkeys(own_layers)
    candidates: list[dict[str, Any]] = []
    names, excluded = config.target_modules, config.exclude_modules
    if names and not isinstance(names, str) and not isinstance(excluded, str):
        unused = sorted({*(excluded or ()), *dead})
        candidates.append(
            {"target_modules": sorted(names), "exclude_modules": unused or None, **own_layers}
        )
    candidates.append({"target_modules": alive, "exclude_modules": dead or None, **all_layers})
    one_of = "|".join(re.escape(n) for n in alive)
    exact = {"target_modules": f"^(?:{one_of})$", "exclude_modules": None, **all_layers}
    targetable = targetable_names(model)
    living = set(alive)
    wanted = [n for n in targetable if n in living]
    for fields in candidates:
        trial = LoraConfig(**fields)
        if [n for n in targetable if check_target_module_exists(trial, n)] == wanted:
            return fields
    return exact


def targetable_names(model: nn.Module) -> list[str]:
    """Names that the base model's modules have without adapters."""
    names: list[str] = []
    inside = "\0"  # prefix of what lies below the adapted module seen last; its children follow it
    for wrapped_name, module in unwrapped(model).named_modules():
        name = without_wrappers(wrapped_name)
        if name and not name.startswith(inside):
            if name not in names[-1:]:  # a wrapper and what it wraps have one name
                names.append(name)
            if isinstance(module, lora.LoraLayer):
                inside = name + "."
    return names


def ragged_config(config: DynLoraConfig, layers: list[GatedLayer]) -> DynLoraConfig:
    """A copy of ``config`` from which an adapter of the layers' present ranks can be rebuilt.

    The scaling of every module stays lora_alpha / init_r, written as alpha_pattern. A module that
    fell to rank 0 is named with rank 0, so that a resumed run still counts it. Of the two halves of
    MultiheadAttention the larger is described; loading gives each the rank that was saved.
    """
    named: dict[str, GatedLayer] = {}
    for half in layers:
        name = half.name.removesuffix(OUT_PROJECTION)
        if name not in named or half.num_components > named[name].num_components:
            named[name] = half
    ragged = copy.copy(config)
    ragged.rank_pattern = {module_key(n): m.num_components for n, m in named.items()}
    ragged.alpha_pattern = {
        module_key(n): m.layer.lora_alpha[m.adapter] for n, m in named.items() if m.num_components
    }
    return ragged
