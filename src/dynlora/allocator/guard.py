"""An allocator that never hears of a step must not go unnoticed.

PEFT's AdaLoRA trains silently without ever pruning when its allocator is not called. Here the first step
of any optimizer that holds an adapter's parameters raises if the adapter's allocator listens to another
optimizer.
"""

from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dynlora.lora.components import LoraComponents


class Listener(Protocol):
    """What is known of an allocator here."""

    adapter: str
    modules: list[LoraComponents]
    optimizer: Any


_attached: WeakSet[Any] = WeakSet()
_waiting: WeakSet[Any] = WeakSet()
_hooks: list[Any] = []


def attach(allocator: Listener) -> None:
    """Note that an allocator listens to its optimizer and has not heard of a step.

    Raises:
        ValueError: another one listens to the same optimizer for the same adapter.
    """
    ours = {id(m.layer) for m in allocator.modules}
    for other in list(_attached):
        if other.adapter != allocator.adapter or not any(
            id(m.layer) in ours for m in other.modules
        ):
            continue
        _waiting.discard(other)  # of a run that was interrupted before its first step
        if other.optimizer is allocator.optimizer:
            raise ValueError(
                f"adapter {allocator.adapter!r} already has a RankAllocator on this optimizer, and two "
                "would prune it twice. Give a Trainer one DynLoraCallback; in a loop of your own, detach() "
                "the first RankAllocator."
            )
    _attached.add(allocator)
    _waiting.add(allocator)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_unheard_step))


def heard(allocator: Listener) -> None:
    """The allocator has heard of a step."""
    _waiting.discard(allocator)
    if not _waiting and _hooks:
        _hooks.pop().remove()


def detach(allocator: Listener) -> None:
    """The allocator no longer listens."""
    _attached.discard(allocator)
    heard(allocator)


def _refuse_unheard_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    stepped: set[int] | None = None
    for allocator in list(_waiting):
        if allocator.optimizer is optimizer:
            continue
        if stepped is None:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        moving = [p.parameter for m in allocator.modules if not m.is_dropped for p in m.probes]
        if any(id(p) in stepped and p.grad is not None for p in moving):
            raise RuntimeError(
                f"adapter {allocator.adapter!r} is being stepped by an optimizer "
                f"({type(optimizer).__name__}) that its RankAllocator is not attached to, so nothing "
                "would ever be pruned. Build RankAllocator(model, optimizer, ...) with the optimizer "
                "whose step() trains the adapter."
            )
