"""The LoraConfig that describes an adapter's present ranks: which modules, which rank and which alpha.

PEFT reads pattern keys as regular expressions and refuses rank 0, so names are anchored and escaped
and modules of rank 0 are excluded.
"""

import copy
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from dynlora.adapter_files.format import is_rewriting
from dynlora.adapter_files.plain_config import exact_key, target_fields
from dynlora.lora.components import LoraComponents, unwrapped, without_wrappers


def rewrites_base(config: LoraConfig) -> bool:
    """Whether the adapter's start changed the base weights, as PiSSA's does.

    What is saved fits only a base that was changed in the same way, and PEFT changes it again at each
    load, by the ranks in the config: they must stay those of the start.
    """
    return is_rewriting(config.init_lora_weights)


def refuse_unsaved_biases(config: LoraConfig) -> None:
    """Refuse ``bias="lora_only"`` where PEFT trains these biases and leaves them out of what it saves.

    Raises:
        ValueError: it is asked of a PEFT before 0.21.
    """
    installed = version("peft")
    if config.bias == "lora_only" and Version(installed) < Version("0.21"):
        raise ValueError(
            f"bias='lora_only' needs peft 0.21 or newer: peft {installed} trains the biases of the adapted "
            "modules and does not save them. Upgrade peft, or set bias to 'all' or 'none'."
        )


def recorded_fields(config: LoraConfig) -> dict[str, Any]:
    """LoraConfig's fields that tell how an adapter was set up, as JSON can say them.

    Those are what differs from PEFT's defaults, and r and lora_alpha in any case.
    """
    defaults = LoraConfig().to_dict()
    fields = {k: v for k, v in config.to_dict().items() if k in defaults}
    kept = {k: v for k, v in fields.items() if k in {"r", "lora_alpha"} or v != defaults[k]}
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in kept.items()}


def ragged_config(
    model: nn.Module, config: LoraConfig, modules: Sequence[LoraComponents]
) -> LoraConfig:
    """A copy of the start's ``config`` from which stock PEFT rebuilds the modules at their present ranks.

    Args:
        model: the model whose module names the patterns must tell apart.
        config: the adapter's config when the run began.
        modules: all of its modules, dropped ones included.
    """
    present = [m for m in modules if m.rank]
    if not present:
        raise ValueError(
            "model has no component left: the adapter equals the base model. Raise target_r."
        )
    ragged = copy.copy(config)
    ragged.rank_pattern, ragged.alpha_pattern = {}, {}
    if config.init_lora_weights == "orthogonal":
        ragged.init_lora_weights = True  # PEFT refuses the other at odd ranks, loading included
    for module in present:
        key, rank = exact_key(module.name), module.rank
        alpha = (module.scaling or 1.0) * (rank**0.5 if config.use_rslora else rank)
        if rank != config.r:
            ragged.rank_pattern[key] = rank
        if not math.isclose(alpha, config.lora_alpha, rel_tol=1e-12):
            ragged.alpha_pattern[key] = int(alpha) if alpha == int(alpha) else alpha
    if len(present) < len(modules):
        ranks = {m.name: m.rank for m in modules if not isinstance(m.layer, lora.ParamWrapper)}
        alive, dead = ([n for n, r in ranks.items() if bool(r) is has] for has in (True, False))
        others = [name for name in targetable_names(model) if name not in ranks]
        for field, value in target_fields(vars(config), alive, dead, others=others).items():
            setattr(ragged, field, value)
    return ragged


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


def swap_config_(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Replace the adapter's config wherever the model knows it; the old object stays as it was."""
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict) and adapter in configs:
            configs[adapter] = config
