"""FSDP2 keeps parameters as DTensors, a shard on every process; these functions meet it halfway."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective call), any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(mask: Tensor, tensor: Tensor) -> Tensor:
    """``mask``, equal on every process, laid out as ``tensor`` is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(mask, tensor.device_mesh, tensor.placements)
    return mask


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of ``tensor``."""
    return isinstance(tensor, DTensor)
