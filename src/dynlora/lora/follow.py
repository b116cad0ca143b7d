"""A model that loads a checkpoint takes the ranks that the checkpoint holds, in place.

A run that goes on builds its model by the user's unchanged script, at the first ranks everywhere, and
``load_best_model_at_end`` may ask for ranks from before the freeze.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from dynlora.lora.components import LoraComponents, find_adapter, find_components, unwrapped
from dynlora.lora.configs import ragged_config, swap_config_

_DO_NOTHING = "".format
"""A built-in that takes any arguments."""


@dataclass(frozen=True)
class AdapterStart:
    """An adapter as it was when its run began.

    Attributes:
        name: of the adapter.
        config: its config, which the model's later ones are made from.
        modules: its modules, those included that were dropped since.
        ranks, scalings, sizes: of each module by name: components, the constant s, and parameters of one
            component.
    """

    name: str
    config: LoraConfig
    modules: list[LoraComponents]
    ranks: dict[str, int]
    scalings: dict[str, float | None]
    sizes: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, adapter: str | None = None) -> "AdapterStart":
        """The adapter of ``model`` as it is now; ValueError if there is none, or several to choose from."""
        name, config = find_adapter(model, adapter)
        modules = find_components(model, name)
        return cls(
            name=name,
            config=config,
            modules=modules,
            ranks={m.name: m.rank for m in modules},
            scalings={m.name: m.scaling for m in modules},
            sizes={m.name: m.component_size for m in modules},
        )

    def is_of(self, model: nn.Module) -> bool:
        """Whether the adapter is in ``model``."""
        held = {id(m) for m in model.modules()}
        return all(id(m.layer) in held for m in self.modules)


class CheckpointFollower:
    """A hook of the base model that resizes the adapter before a state dict is loaded into it.

    In a copy or a pickle of the model the hook does nothing. ``start`` is the adapter as it was when the
    run began.
    """

    def __init__(self, model: nn.Module, start: "AdapterStart") -> None:
        self.model: nn.Module | None = model
        self.start = start
        self._handle: Any = unwrapped(model).register_load_state_dict_pre_hook(self)

    def __call__(self, base: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
        """Give each module the rank of its tensors in ``state``; a module without any is dropped."""
        if self.model is None:
            return
        modules = self.start.modules
        names = {id(m): f"{prefix}{name}." for name, m in base.named_modules()}
        ranks = {m.name: _stored_rank(m, state, names[id(m.layer)]) for m in modules}
        if not any(ranks.values()):
            return  # another part of the model is loaded
        for module in modules:
            if module.is_dropped and _name_adapter_(module, state, names[id(module.layer)]):
                ranks[module.name] = _stored_rank(module, state, names[id(module.layer)])
        for module in modules:
            self._follow(module, ranks[module.name])
        ragged = ragged_config(self.model, self.start.config, modules)
        swap_config_(self.model, self.start.name, ragged)

    def remove(self) -> None:
        """Stop following."""
        self._handle.remove()
        self.model = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Any:
        """A hook that does nothing: the copy of a model is not part of the run."""
        return _DO_NOTHING

    def __reduce__(self) -> Any:
        """Pickle as a hook that does nothing and needs no dynlora where it is loaded."""
        return getattr, ("", "format")

    def _follow(self, module: LoraComponents, rank: int) -> None:
        if rank == 0:
            if not module.is_dropped:
                module.drop_()
        elif module.is_dropped:
            self._restore_(module, rank)
        elif rank != module.rank:
            module.resize_(rank)

    @torch.no_grad()
    def _restore_(self, module: LoraComponents, rank: int) -> None:
        """Give a dropped module its adapter back, at the scaling that it had."""
        plain = copy.copy(self.start.config)
        plain.init_lora_weights = True  # another start could read or rewrite base weights
        divisor = rank**0.5 if plain.use_rslora else rank
        alpha = (self.start.scalings[module.name] or 1.0) * divisor
        with torch.random.fork_rng(devices=[]):
            module.restore_(rank, alpha, plain)
        module.forget_scores()


def _stored_rank(module: LoraComponents, state: Mapping[str, Any], prefix: str) -> int:
    """The module's rank in a state dict, 0 where it holds no tensor of the adapter."""
    for name in (f"lora_B.{module.adapter}.weight", f"lora_embedding_B.{module.adapter}"):
        if prefix + name in state:
            stored = int(state[prefix + name].shape[1])
            return stored // int(getattr(module.layer, "num_experts", 1))
    return 0


def _name_adapter_(module: LoraComponents, state: dict[str, Any], prefix: str) -> bool:
    """Put the adapter's name into the keys of a dropped module, in place; False where it has none.

    PEFT finds the names for a file's keys through the layers that the model has, and this one is gone.
    """
    inner = f"{prefix}base_layer.out_proj."  # of MultiheadAttention
    renamed = {}
    for key in state:
        start = inner if key.startswith(inner) else prefix
        container, _, attribute = key.removeprefix(start).partition(".")
        if (
            key.startswith(start)
            and container.startswith("lora_")
            and attribute in {"", "weight", "c"}
        ):
            renamed[key] = ".".join(filter(None, (start + container, module.adapter, attribute)))
    for key, named in renamed.items():
        state[named] = state.pop(key)
    return bool(renamed)
