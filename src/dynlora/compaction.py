"""Remove dead components for real: from modules, gradients and the optimizer's state.

New Parameters are swapped in everywhere. Giving an old one another shape would break the next
backward while an autograd graph, or only its AccumulateGrad node, is alive.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynlora.adapter.components import RANK_DIMS, GatedLayer
from dynlora.adapter.layers import can_drop, drop_, dropped_parameters, note_rank_, set_factors_
from dynlora.optimizer_state import CannotShrinkError, cut_states


def compact_(layers: Sequence[GatedLayer], optimizer: Optimizer | None) -> None:
    """Cut every layer down to its live components, in place; a module of rank 0 stops computing.

    Everything is prepared before anything is changed, so an error leaves the run as it was.

    Args:
        layers: gated layers whose ``live`` masks say what stays; dead gates must be 0.
        optimizer: the optimizer that holds their parameters; None for a copy that no one trains.

    Raises:
        CannotShrinkError: a state tensor has neither the parameter's shape nor a known one, the
            optimizer keeps a list of parameters of its own, or a parameter has hooks.
    """
    swaps: dict[int, tuple[nn.Parameter, nn.Parameter, dict[str, Any]]] = {}
    shrinking = [m for m in layers if not m.is_dropped and not bool(m.live.all())]
    for gated in shrinking:
        keep = gated.live.nonzero().flatten()
        for old, dim in zip(gated.parameters, RANK_DIMS, strict=True):
            _refuse_hooks(gated.name, old)
            here = keep.to(old.device)
            held = optimizer.state.get(old, {}) if optimizer else {}
            state = cut_states(held, old, here, dim)
            swaps[id(old)] = (old, _cut_parameter(old, here, dim), state)
    if optimizer:
        _refuse_private_lists(optimizer, swaps)
    gone: set[int] = set()
    for gated in shrinking:
        rank = int(gated.live.sum())
        new = [swaps[id(p)][1] for p in gated.parameters]
        if rank == 0 and can_drop(gated.layer):
            gone.update(id(p) for p in gated.parameters)
        kept = gated.ema[gated.live]
        set_factors_(gated.layer, gated.adapter, *new)
        gated.layer.lora_ema[gated.adapter] = kept
        gated.layer.lora_live[gated.adapter] = torch.ones_like(kept, dtype=torch.bool)
        if rank == 0 and can_drop(gated.layer):
            drop_(gated.layer, gated.adapter)
        else:
            note_rank_(gated.layer, gated.adapter, rank)
    if optimizer:
        _swap_in_optimizer_(optimizer, swaps, gone)


def _refuse_hooks(name: str, parameter: nn.Parameter) -> None:
    """A hook, such as an optimizer step in the backward pass, would stay behind with the old one."""
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise CannotShrinkError(
            f"a factor of module {name!r} of shape {tuple(parameter.shape)} has hooks of its own. Set "
            "compact=False to keep all shapes until finalize_."
        )


def _refuse_private_lists(optimizer: Optimizer, swaps: Mapping[int, Any]) -> None:
    """LBFGS and others go on training the parameters they noted down at the start."""
    for name, value in vars(optimizer).items():
        if isinstance(value, list | tuple) and any(id(p) in swaps for p in value):
            raise CannotShrinkError(
                f"optimizer {type(optimizer).__name__} keeps a list of parameters of its own, {name!r}. "
                "Set compact=False to keep all shapes until finalize_."
            )


def release_dropped_(layers: Sequence[GatedLayer], optimizer: Optimizer) -> None:
    """Take the parameters of dropped modules out of the optimizer, as compaction would have done.

    A checkpoint from after the freeze, loaded into a model that an optimizer already holds, drops modules
    of rank 0; the optimizer's own state fits only without them.
    """
    gone = {id(p) for m in layers for p in dropped_parameters(m.layer, m.adapter)}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def _cut_parameter(old: nn.Parameter, keep: Tensor, dim: int) -> nn.Parameter:
    new = nn.Parameter(old.detach().index_select(dim, keep), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = old.grad.index_select(dim, keep)
    return new


def _swap_in_optimizer_(
    optimizer: Optimizer,
    swaps: Mapping[int, tuple[nn.Parameter, nn.Parameter, dict[str, Any]]],
    gone: set[int],
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [
            swaps[id(p)][1] if id(p) in swaps else p for p in group["params"] if id(p) not in gone
        ]
    for key, (old, new, state) in swaps.items():
        if old in optimizer.state:
            del optimizer.state[old]
            if key not in gone:
                optimizer.state[new] = state
