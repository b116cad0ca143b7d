"""A gated adapter that no RankAllocator serves must not be trained unnoticed.

A DynLoraConfig asks for pruning, so every trainable gate waits for an allocator, and the first optimizer
step that would update a waiting gate raises.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dynlora.gated.layer import factors, is_gated

_waiting: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_hooks: list[Any] = []


def expect_allocator(layer: nn.Module, adapter: str) -> None:
    """From now on, stepping the gate of ``adapter`` in ``layer`` without an allocator is an error."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_unattended_step))
    _waiting.setdefault(layer, set()).add(adapter)


def stop_waiting(layer: nn.Module, adapter: str) -> None:
    """The gate has an allocator, or is no longer dynamic."""
    adapters = _waiting.get(layer, set())
    adapters.discard(adapter)
    if not adapters:
        _waiting.pop(layer, None)
    if not _waiting and _hooks:
        _hooks.pop().remove()


def _refuse_unattended_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    gates = _gates_about_to_move()
    if not gates:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for gate_id in stepped & gates.keys():
        raise RuntimeError(
            f"DynLora adapter {gates[gate_id]!r} is being trained without a RankAllocator, so nothing "
            "would ever be pruned. Add callbacks=[DynLoraCallback()] to your Trainer, or build "
            "RankAllocator(model, optimizer, total_steps=...) before the first optimizer.step(). "
            "To train gates without pruning on purpose, set target_r=init_r."
        )


def _gates_about_to_move() -> dict[int, str]:
    """Adapter of the waiting gates that have a gradient, by the gate's id."""
    found = {}
    for reference in _waiting.keyrefs():  # all at once: another thread may train a model of its own
        layer = reference()
        if layer is None:
            continue
        for adapter in _waiting.get(layer, set()):
            if is_gated(layer, adapter):
                gate = factors(layer, adapter)[2]
                if gate.grad is not None:
                    found[id(gate)] = adapter
    return found
