"""Several processes: one choice for all of them, and a DDP that learns of the shrunken parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynlora._private import active_ddp


def world_size() -> int:
    """Number of processes that train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process is the one that writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def broadcast_choice(keep: Tensor, device: torch.device) -> Tensor:
    """The first process's ``keep``, on every process: scores may differ in their last bits.

    Here and below, ``device`` is one that the process group communicates on.
    """
    if world_size() == 1:
        return keep
    choice = keep.to(device, torch.uint8)
    dist.broadcast(choice, src=0)
    return choice.bool().to(keep.device)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any of the processes; all of them must call it."""
    if world_size() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def mean_over_processes(value: float, device: torch.device) -> float:
    """The mean of the processes' values; all of them must call it."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / world_size()


def sum_over_processes_(tensor: Tensor) -> None:
    """Let every process hold the sum of the processes' tensors; all of them must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor)


class DdpFinder:
    """Finds the DistributedDataParallel around a model that one was only given from the inside.

    A Trainer wraps its model after callbacks have seen it, so the wrapper is caught at work: DDP names
    itself while its forward runs. Given the wrapper, it is found at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.ddp = next(
            (m for m in model.modules() if isinstance(m, DistributedDataParallel)), None
        )
        self._handle: Any = None
        if self.ddp is None and world_size() > 1:
            self._handle = model.register_forward_pre_hook(self._look)

    def _look(self, _module: nn.Module, _args: Any) -> None:
        if self.ddp is None:
            self.ddp = active_ddp()

    def forget(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
