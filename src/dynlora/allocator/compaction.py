"""Remove dead components for real: from modules, gradients and the optimizer's state.

Parameters stay the same objects and get smaller data, so that lists kept for clipping, averages and
optimizers stay right.
"""

from collections.abc import Sequence, ValuesView
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynlora.allocator.optimizer_state import cut_states
from dynlora.lora.components import LoraComponents

_BESIDE_PARAMS = ("param_names", "names", "scaling_factors")
"""Lists of a parameter group with one entry for each parameter: torch's names, and LoRA-FA's."""


@torch.no_grad()
def compact_(modules: Sequence[LoraComponents], optimizer: Optimizer | None) -> None:
    """Cut every module down to its live components, in place; a module of rank 0 stops computing.

    A module that cannot lose its adapter keeps one component of zeros. Everything is prepared before
    anything is changed, so an error leaves the run as it was.

    Args:
        modules: whose ``live`` masks say what stays; dead components must be 0.
        optimizer: the one that holds their parameters; None for a copy that no one trains.

    Raises:
        CannotShrinkError: an optimizer state has a shape that says nothing about components.
    """
    optimizers = [] if optimizer is None else with_inner_optimizers(optimizer)
    shrinking = [m for m in modules if not m.is_dropped and not bool(m.live.all())]
    cuts = [(m, keep) for m in shrinking if len(keep := m.kept()) < m.rank]
    states = [
        (one, entry) for one in optimizers for m, keep in cuts for entry in _states(one, m, keep)
    ]
    gone = [parameter for module, keep in cuts for parameter in module.keep_(keep)]
    for one, (key, state) in states:
        one.state[key] = state
    for one in optimizers:
        forget_parameters_(one, gone)


def _states(
    optimizer: Optimizer, module: LoraComponents, keep: Tensor
) -> list[tuple[Any, dict[str, Any]]]:
    """The optimizer's state of each of the module's parameters, by key, for what stays."""
    states = []
    for factor in module.factors if len(keep) else ():
        parameter = factor.parameter
        if (key := _state_key(optimizer, parameter)) in optimizer.state:
            places = factor.positions(keep.to(parameter.device))
            states.append((key, cut_states(optimizer.state[key], parameter, places, factor.dim)))
    return states


def _state_key(optimizer: Optimizer, parameter: nn.Parameter) -> Any:
    """What a parameter's state is found by: itself, but in LoRA-FA, where A is frozen, the pair's name."""
    for group in optimizer.param_groups:
        for held, name in zip(group["params"], group.get("names", ()), strict=False):
            if held is parameter and parameter.requires_grad and "lora" in name:
                return name[: name.find("lora")] + "lora"
    return parameter


def with_inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it steps: its attributes, alone or in lists and dicts."""
    found = [optimizer]
    for one in found:
        for value in vars(one).values():
            held = value.values() if isinstance(value, dict) else value
            inner = list(held) if isinstance(held, list | tuple | ValuesView) else [held]
            known = {id(o) for o in found}
            found += [o for o in inner if isinstance(o, Optimizer) and id(o) not in known]
    return found


def forget_parameters_(optimizer: Optimizer, gone: Sequence[nn.Parameter]) -> None:
    """Take parameters out of an optimizer, with their state."""
    left = {id(p) for p in gone}
    for parameter in gone:
        optimizer.state.pop(_state_key(optimizer, parameter), None)
        parameter.grad = None
    for group in optimizer.param_groups:
        stays = [id(p) not in left for p in group["params"]]
        for name in ("params", *_BESIDE_PARAMS):
            if name in group:
                group[name] = list(compress(group[name], stays))
