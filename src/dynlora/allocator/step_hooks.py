"""Hooks around every optimizer step, called once a step, whatever optimizer it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlora.lora.sharding import zero_optimizer

Hook = Callable[[Any, Any, Any], Any]


def steppable(optimizer: Any) -> Any:
    """The torch or ZeRO optimizer inside a wrapper such as accelerate's; TypeError if there is none."""
    if (zero := zero_optimizer(optimizer)) is not None:
        return zero
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={type(optimizer).__name__} must be a torch.optim.Optimizer, whose step hooks "
            "drive the allocator. Pass the optimizer itself, not its name, or the torch optimizer inside "
            "your wrapper."
        )
    return optimizer


def attach(optimizer: Any, *, before: Hook, after: Hook) -> list[Any]:
    """Call ``before`` and ``after`` around each step, with torch's arguments; returns removable handles.

    A ZeRO optimizer has no step hooks, so its ``step`` is wrapped; one that it skips for an overflow is
    not reported to ``after``.
    """
    if not isinstance(optimizer, Optimizer):
        return [_WrappedStep(optimizer, before, after)]
    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


class _WrappedStep:
    """A ZeRO optimizer whose ``step`` calls hooks."""

    def __init__(self, optimizer: Any, before: Hook, after: Hook) -> None:
        self.optimizer = optimizer
        step = optimizer.step

        def hooked_step(*args: Any, **kwargs: Any) -> Any:
            before(optimizer, (optimizer, *args), kwargs)
            result = step(*args, **kwargs)
            if not optimizer.overflow:
                after(optimizer, (optimizer, *args), kwargs)
            return result

        optimizer.step = hooked_step

    def remove(self) -> None:
        """Give the optimizer its own ``step`` back."""
        self.optimizer.__dict__.pop("step", None)


def refuse_capture() -> None:
    """Refuse to be captured in a CUDA graph, whose replays call no hook: nothing would be pruned."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph, whose replays would go unseen by the "
            "RankAllocator: nothing would be scored or pruned. Capture forward and backward pass only, "
            "call optimizer.step() after each replay, and capture again after the freeze."
        )


def once_computed(args: Any, kwargs: dict[str, Any], action: Callable[[], None]) -> Any:
    """Do ``action`` when the coming step's gradients are there: now, or each time its closure has run.

    Args and result are those of a pre-hook of torch: the arguments to use instead, or None.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        action()
        return None

    def wrapped() -> Any:
        loss = closure()
        action()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrapped}
    return (args[0], wrapped, *args[2:]), kwargs


def loss_scale(optimizer: Any) -> Tensor | float | None:
    """By how much the gradients in front of the coming step are still scaled up, None if not at all.

    A fused torch optimizer unscales inside ``step``, and so does a ZeRO optimizer in fp16.
    """
    scale: Tensor | float | None = getattr(optimizer, "grad_scale", None)
    if scale is None and not isinstance(optimizer, Optimizer):
        scale = float(optimizer.loss_scale)
        return None if scale == 1 else scale
    return scale
