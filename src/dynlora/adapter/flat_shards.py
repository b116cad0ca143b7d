"""FSDP1 with ``use_orig_params``: each process holds a slice of one flat tensor per wrapped unit.

Outside forward and backward a parameter is then the 1-d part of itself that fell to this process, often
empty. Only the adapter's own parameters are ever gathered here, never the base model.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

_places: Any = WeakTensorKeyDictionary()  # parameter -> (flat parameter handle, index in it)
_WRAPPER = "_fsdp_wrapped_module."


def remember_flat_shards(model: nn.Module) -> None:
    """Note where FSDP1 keeps each parameter of ``model``, which must be the wrapper itself.

    Raises:
        ValueError: FSDP1 was built without ``use_orig_params``, so there are no parameters to find.
    """
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if not isinstance(module, FullyShardedDataParallel) or handle is None:
            continue
        if not handle._use_orig_params:
            raise ValueError(
                "FullyShardedDataParallel(use_orig_params=False) replaces the adapter's parameters by one "
                "flat tensor, in which no component can be told from another. Pass use_orig_params=True "
                "(accelerate: fsdp_use_orig_params), or use FSDP2."
            )
        for index, parameter in enumerate(handle.flat_param._params):
            _places[parameter] = (handle, index)


def without_wrappers(name: str) -> str:
    """A module name as it was before FSDP1 wrapped anything."""
    return (name + ".").replace(_WRAPPER, "").removesuffix(".")


def unwrap_fsdp(model: nn.Module) -> nn.Module:
    """The module inside an FSDP1 wrapper, any other unchanged."""
    return model.module if isinstance(model, FullyShardedDataParallel) else model


def is_flat_shard(tensor: Tensor) -> bool:
    """Whether FSDP1 keeps ``tensor`` as a part of a flat one."""
    return tensor in _places


def flat_shape(parameter: Tensor) -> torch.Size:
    """The shape of the full parameter."""
    handle, index = _places[parameter]
    shape: torch.Size = handle.flat_param._shapes[index]
    return shape


def gather_flat(parameter: Tensor) -> Tensor:
    """The full parameter, on every process (a collective call)."""
    handle, _ = _places[parameter]
    if parameter.shape == flat_shape(parameter) and not handle.uses_sharded_strategy:
        return parameter
    return _gathered(parameter, parameter.detach())


def gather_flat_gradient(parameter: Tensor) -> Tensor:
    """The full gradient of the parameter, on every process (a collective call); 0 where it has none."""
    part = parameter.grad
    return _gathered(parameter, torch.zeros_like(parameter) if part is None else part)


def _gathered(parameter: Tensor, part: Tensor) -> Tensor:
    handle, _ = _places[parameter]
    shape = flat_shape(parameter)
    if not handle.uses_sharded_strategy:
        return part
    full = part.new_zeros(shape.numel())
    local = local_slice(parameter)
    if local is not None:
        full[local] = part.flatten()
    dist.all_reduce(full, group=handle.process_group)
    return full.view(shape)


def local_slice(parameter: Tensor) -> slice | None:
    """Which elements of the flattened parameter this process holds; None for none of them."""
    handle, index = _places[parameter]
    if not handle.uses_sharded_strategy:
        return slice(0, parameter.numel())
    place = handle.flat_param._shard_param_infos[index]
    if not place.in_shard:
        return None
    return slice(place.intra_param_start_idx, place.intra_param_end_idx + 1)


@torch.no_grad()
def local_part(full: Tensor, parameter: Tensor) -> Tensor:
    """The elements of ``full`` that belong to this process, shaped as ``parameter`` is now."""
    local = local_slice(parameter)
    if local is None:
        return full.new_zeros(0)
    return full.flatten()[local].view(parameter.shape)
