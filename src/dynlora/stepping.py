"""Telling one optimizer step from two hooks that fire for it."""

import sys
from types import FrameType

from torch.optim import Optimizer


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether the calling hook belongs to an inner ``step`` of one and the same optimizer step.

    torch wraps the ``step`` of every optimizer class. Where a subclass calls ``super().step()``, its
    hooks fire for both wrappers, but only the outer one is a step of the run. A counter would stay
    wrong after an exception inside ``step``; the call stack never is.
    """
    frame: FrameType | None = sys._getframe(1)
    wrappers = 0
    while frame is not None and wrappers < 2:
        if frame.f_code.co_name == "wrapper" and frame.f_globals["__name__"] == _TORCH_OPTIMIZER:
            wrappers += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return wrappers == 2


_TORCH_OPTIMIZER = Optimizer.__module__
