"""An allocator that never hears of a step must not go unnoticed.

PEFT's AdaLoRA trains silently without ever pruning when its allocator is not called. Here the first step
of any optimizer that holds an adapter's parameters raises if the adapter's allocator listens to another
optimizer.
"""

from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_attached: WeakSet[Any] = WeakSet()
_waiting: WeakSet[Any] = WeakSet()
"""Of RankAllocators: those that listen, and those of them that have not heard of a step."""
_hooks: list[Any] = []


def attach(allocator: Any) -> None:
    """Note that an allocator listens to its optimizer; ValueError if another does for its adapter."""
    ours = {id(m.layer) for m in allocator.modules}
    for other in list(_attached):
        is_same = other.adapter == allocator.adapter and any(
            id(m.layer) in ours for m in other.modules
        )
        if is_same:
            _waiting.discard(other)  # of a run that was interrupted before its first step
        if is_same and other.optimizer is allocator.optimizer:
            raise ValueError(
                f"adapter {allocator.adapter!r} already has a RankAllocator on this optimizer, and two "
                "would prune it twice. Give a Trainer one DynLoraCallback; in a loop of your own, detach() "
                "the first RankAllocator."
            )
    _attached.add(allocator)
    _waiting.add(allocator)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_unheard_step))


def heard(allocator: Any) -> None:
    """The allocator has heard of a step."""
    _waiting.discard(allocator)
    if not _waiting and _hooks:
        _hooks.pop().remove()


def detach(allocator: Any) -> None:
    """The allocator no longer listens."""
    _attached.discard(allocator)
    heard(allocator)


def _refuse_unheard_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    unheard = [a for a in list(_waiting) if a.optimizer is not optimizer]
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for allocator in unheard:
        moving = [p.parameter for m in allocator.modules if not m.is_dropped for p in m.probes]
        if any(id(p) in stepped and p.grad is not None for p in moving):
            raise RuntimeError(
                f"adapter {allocator.adapter!r} is being stepped by an optimizer "
                f"({type(optimizer).__name__}) that its RankAllocator is not attached to, so nothing "
                "would ever be pruned. Build RankAllocator(model, optimizer, ...) with the optimizer "
                "whose step() trains the adapter."
            )
