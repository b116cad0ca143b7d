"""A wrong use must fail at the first step: nobody trains gates that nobody allocates.

PEFT's AdaLoRA trains silently without ever pruning when its allocator is not called. Here every
trainable gate waits for a RankAllocator, and the first optimizer step that would update a waiting
gate raises: no allocator, or one that is attached to another optimizer.
"""

from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dynlora.adapter.layers import factors, is_gated

_waiting: WeakKeyDictionary[nn.Module, dict[str, ReferenceType[Optimizer] | None]]
_waiting = WeakKeyDictionary()
_hooks: list[Any] = []
_heard: WeakKeyDictionary[nn.Module, dict[str, ReferenceType[Optimizer]]]
_heard = WeakKeyDictionary()


def expect_allocator(layer: nn.Module, adapter: str) -> None:
    """From now on, stepping the gate of ``adapter`` in ``layer`` without an allocator is an error."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_unattended_step))
    _waiting.setdefault(layer, {})[adapter] = None


def expect_step_of(optimizer: Optimizer, layer: nn.Module, adapter: str) -> None:
    """The gate has an allocator, which listens to ``optimizer``: only that one may step it first.

    Raises:
        ValueError: another allocator of this gate listens to the same optimizer.
    """
    heard = _heard.setdefault(layer, {})
    if adapter in heard and heard[adapter]() is optimizer:
        raise ValueError(
            f"DynLora adapter {adapter!r} has a RankAllocator on this optimizer already, and two would "
            "prune it twice. Give a Trainer one DynLoraCallback; in a loop of your own, detach() the "
            "first RankAllocator."
        )
    heard[adapter] = ref(optimizer)
    if adapter in _waiting.get(layer, {}):
        _waiting[layer][adapter] = ref(optimizer)


def stop_hearing(optimizer: Optimizer, layer: nn.Module, adapter: str) -> None:
    """The allocator of this gate no longer listens to ``optimizer``."""
    heard = _heard.get(layer, {})
    if adapter in heard and heard[adapter]() is optimizer:
        del heard[adapter]


def stop_waiting(layer: nn.Module, adapter: str) -> None:
    """The allocator of this gate has seen a step, or the gate is no longer dynamic."""
    adapters = _waiting.get(layer, {})
    adapters.pop(adapter, None)
    if not adapters:
        _waiting.pop(layer, None)


def _refuse_unattended_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    gates = _gates_about_to_move()
    if not gates:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for gate_id in stepped & gates.keys():
        adapter, heard = gates[gate_id]
        if heard is None:
            raise RuntimeError(
                f"DynLora adapter {adapter!r} is being trained without a RankAllocator, so nothing "
                "would ever be pruned. Add callbacks=[DynLoraCallback()] to your Trainer, or build "
                "RankAllocator(model, optimizer, total_steps=...) before the first optimizer.step(). "
                "To train gates without pruning on purpose, set target_r=init_r."
            )
        if heard() is not optimizer:
            raise RuntimeError(
                f"DynLora adapter {adapter!r} is being stepped by an optimizer "
                f"({type(optimizer).__name__}) that its RankAllocator is not attached to, so nothing "
                "would ever be pruned. Build RankAllocator(model, optimizer, ...) with the optimizer "
                "whose step() trains the adapter."
            )


def _gates_about_to_move() -> dict[int, tuple[str, ReferenceType[Optimizer] | None]]:
    """Adapter and optimizer of the waiting gates that have a gradient, by the gate's id."""
    found = {}
    for reference in _waiting.keyrefs():  # all at once: another thread may train a model of its own
        layer = reference()
        if layer is None:
            continue
        for adapter, heard in _waiting.get(layer, {}).items():
            if not is_gated(layer, adapter):
                continue
            gate = factors(layer, adapter)[2]
            # FSDP1 may leave a view of a flat tensor in its place, which must not even be asked
            if isinstance(gate, nn.Parameter) and gate.grad is not None:
                found[id(gate)] = adapter, heard
    return found
