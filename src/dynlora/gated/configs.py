"""Configs of a gated adapter: with its present ranks, and when it has become a plain LoRA."""

import copy
from collections.abc import Mapping, Sequence

from peft import LoraConfig
from torch import nn

from dynlora.adapter_files.format import OUT_PROJECTION
from dynlora.adapter_files.plain_config import exact_key
from dynlora.gated.config import DynLoraConfig, plain_lora_fields
from dynlora.lora.components import LoraComponents
from dynlora.lora.configs import target_fields


def with_one_component(config: DynLoraConfig, name: str) -> DynLoraConfig:
    """A copy of ``config`` by which PEFT, which refuses rank 0, can build module ``name``."""
    built = copy.copy(config)
    built.rank_pattern = {exact_key(name): 1}
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
    pattern = {exact_key(n): r for n, r in ranks.items() if 0 < r < largest}
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


def ragged_config(config: DynLoraConfig, modules: Sequence[LoraComponents]) -> DynLoraConfig:
    """A copy of ``config`` from which an adapter of the modules' present ranks can be rebuilt.

    The scaling of every module stays lora_alpha / init_r, written as alpha_pattern. A module that
    fell to rank 0 is named with rank 0, so that a resumed run still counts it. Of the two halves of
    MultiheadAttention the larger is described; loading gives each the rank that was saved.
    """
    named: dict[str, LoraComponents] = {}
    for half in modules:
        name = half.name.removesuffix(OUT_PROJECTION)
        if name not in named or half.rank > named[name].rank:
            named[name] = half
    ragged = copy.copy(config)
    ragged.rank_pattern = {exact_key(n): m.rank for n, m in named.items()}
    ragged.alpha_pattern = {  # a module of rank 0 is built with one component, to the same scaling
        exact_key(n): m.layer.lora_alpha[m.adapter] if m.rank else m.layer.scaling[m.adapter]
        for n, m in named.items()
    }
    return ragged
