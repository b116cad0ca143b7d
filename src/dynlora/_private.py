"""Every private name of torch, PEFT and transformers that the package touches, in one place.

Those of the fused path stand in ``fused/conditions.py``. A test looks for each of them, so that a release
that moves one is noticed there, and upper bounds keep such a release away until it is known.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features as in_out_features
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = [
    "ConvNd",
    "active_ddp",
    "calling_self",
    "can_rebuild",
    "extended_peft_type",
    "in_out_features",
    "is_inner_step",
    "prepared_inputs",
    "rebuild_reducer_",
    "stand_in",
    "uncompiled",
    "without_active_adapter",
]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, any other unchanged."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        inner: nn.Module = model._orig_mod
        return inner
    return model


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running; it names itself while it does."""
    return DistributedDataParallel._get_active_ddp_module()


def can_rebuild(ddp: DistributedDataParallel) -> bool:
    """Whether the reducer can be built anew: not with communication hooks or delayed reduction."""
    return bool(
        hasattr(ddp, "reducer")
        and not ddp._comm_hooks
        and not ddp._delay_all_reduce_params
        and ddp.mixed_precision is None
    )


def rebuild_reducer_(ddp: DistributedDataParallel) -> None:
    """Let DDP reduce the gradients of the model's present parameters, in place.

    The old reducer knows their old shapes. Call it between two steps, on every process; settings of the
    wrapper stay.
    """
    ddp._module_parameters = [
        p for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    ]
    del ddp.reducer  # takes its hooks off before new ones are made
    parameters, expect_sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False


@contextmanager
def without_active_adapter(layer: Any) -> Iterator[None]:
    """Let no adapter of a LoRA layer be active, so that PEFT chooses none when one is deleted."""
    active = layer._active_adapter
    layer._active_adapter = []
    try:
        yield
    finally:
        layer._active_adapter = active


@contextmanager
def stand_in(holder: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Let a tensor stand in for a parameter; the order of parameters, which optimizers save, stays."""
    parameter = holder._parameters[name]
    holder._parameters[name] = tensor  # type: ignore[assignment]  # no parameter, but with its gradient
    try:
        yield
    finally:
        holder._parameters[name] = parameter


def extended_peft_type(name: str) -> PeftType:
    """Member ``name`` of PeftType, added in memory if this PEFT does not know it.

    PEFT has no plug-in registry, and its mappings, transformers and hot-swapping all expect a real
    member with ``.value``. The enum metaclass refuses ``setattr``, hence ``type.__setattr__``.
    """
    if name in PeftType._value2member_map_:
        return PeftType(name)
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether the calling hook belongs to an inner ``step`` of one and the same optimizer step.

    torch wraps the ``step`` of every optimizer class. Where a subclass calls ``super().step()``, its
    hooks fire for both wrappers, but only the outer one is a step of the run. A counter would stay
    wrong after an exception inside ``step``; the call stack never is.
    """
    frame: FrameType | None = sys._getframe(1)
    wrappers = 0
    while frame is not None and wrappers < 2:
        if (
            frame.f_code.co_name == "wrapper"
            and frame.f_globals["__name__"] == Optimizer.__module__
        ):
            wrappers += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return wrappers == 2


def calling_self(kind: type) -> Any:
    """The nearest ``self`` of a kind in the calls that led here, None if there is none.

    A Trainer gives its callbacks no way to itself or to its callback handler, which have just called.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def prepared_inputs(trainer: Any, inputs: Any) -> Any:
    """A batch as a Trainer gives it to its model: on the device, and with what its kind adds."""
    return trainer._prepare_inputs(inputs)
