"""Remove dead components for real: from modules, gradients and the optimizer's state.

New Parameters are swapped in everywhere. Giving an old one another shape would break the next
backward while an autograd graph, or only its AccumulateGrad node, is alive.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynlora.adapter.components import GatedLayer
from dynlora.adapter.layers import can_drop, drop_, dropped_parameters, note_rank_, set_factors_

_RANK_DIMS = (0, 1, 0)  # where A (rank, in, ...), B (out, rank, ...) and c (rank,) count components


class UnknownStateError(TypeError):
    """An optimizer keeps state of a shape that cannot be cut down to the live components."""


def compact_(layers: Sequence[GatedLayer], optimizer: Optimizer) -> None:
    """Cut every layer down to its live components, in place; a module of rank 0 stops computing.

    Everything is prepared before anything is changed, so an error leaves the run as it was.

    Args:
        layers: gated layers whose ``live`` masks say what stays; dead gates must be 0.
        optimizer: the optimizer that holds their parameters.

    Raises:
        UnknownStateError: a state tensor has neither the parameter's shape nor a known factored one.
    """
    swaps: dict[int, tuple[nn.Parameter, nn.Parameter, dict[str, Any]]] = {}
    shrinking = [m for m in layers if not m.is_dropped and not bool(m.live.all())]
    for gated in shrinking:
        keep = gated.live.nonzero().flatten()
        for old, dim in zip(gated.parameters, _RANK_DIMS, strict=True):
            state = {
                key: cut_state(key, value, old, keep.to(old.device), dim)
                for key, value in optimizer.state.get(old, {}).items()
            }
            swaps[id(old)] = (old, _cut_parameter(old, keep.to(old.device), dim), state)
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
    _swap_in_optimizer_(optimizer, swaps, gone)


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


def cut_state(key: str, value: object, old: Tensor, keep: Tensor, dim: int) -> object:
    """The part of one optimizer state entry that belongs to the components in ``keep``.

    Args:
        key: name of the entry.
        value: the entry: a tensor of the parameter's shape; a factored second moment as Adafactor
            keeps it, in torch (one dimension is 1) or transformers (the last or the last but one
            dimension is missing); a scalar; or no tensor at all.
        old: the parameter before the cut.
        keep: indices of the live components, (live,).
        dim: the dimension of ``old`` that counts components.

    Raises:
        UnknownStateError: the entry has another shape.
    """
    if not isinstance(value, Tensor):
        return value
    if value.ndim == old.ndim and all(
        have in {full, 1} for have, full in zip(value.shape, old.shape, strict=True)
    ):
        return value.index_select(dim, keep) if value.shape[dim] == old.shape[dim] else value
    if value.numel() == 1:
        return value
    rows, columns = old.shape[:-1], (*old.shape[:-2], *old.shape[-1:])
    if old.ndim > 1 and value.shape == rows and not ("col" in key and rows == columns):
        return value.index_select(dim, keep) if dim < old.ndim - 1 else value
    if old.ndim > 1 and value.shape == columns:
        return value if dim == old.ndim - 2 else value.index_select(min(dim, old.ndim - 2), keep)
    raise UnknownStateError(
        f"optimizer state {key!r} of shape {tuple(value.shape)} cannot be cut with its parameter of "
        f"shape {tuple(old.shape)}. Set compact=False to keep all shapes until finalize_."
    )


def _swap_in_optimizer_(
    optimizer: Optimizer,
    swaps: dict[int, tuple[nn.Parameter, nn.Parameter, dict[str, Any]]],
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
