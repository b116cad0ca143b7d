"""Switch the fused computation of a model's LoRA layers on and off.

A layer is switched by its class alone: the fused class adds nothing to the layer's state, so
parameters, buffers, state dicts and the optimizer do not notice. A model pickled whole while it is
on names this module; a saved adapter never does.
"""

import sys
from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from dynlora.fused.conditions import common_dtype, fusable_adapter, is_worthwhile
from dynlora.fused.linear import fused_forward


class FusedLinear(Linear):  # type: ignore[misc]  # peft is untyped
    """PEFT's LoRA layer; its forward is the fused function wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) for x (..., in); further arguments are PEFT's and take its forward."""
        is_plain_call = is_worthwhile(self) and not args and not kwargs
        adapter = fusable_adapter(self) if is_plain_call else None
        dtype = None if adapter is None else common_dtype(self, adapter, x)
        if adapter is None or dtype is None:
            return super().forward(x, *args, **kwargs)
        return fused_forward(self, adapter, x, dtype)


def fuse_(model: nn.Module, adapter: str | None = None) -> int:
    """Let the model's LoRA layers over a plain ``nn.Linear`` compute base and adapter in one function.

    Over bitsandbytes' 4- and 8-bit layers the base keeps its product and the update is fused.
    Values and gradients stay PEFT's to rounding; with dropout another mask of the same law is
    drawn. Merged, disabled, hooked, mixed or DoRA layers keep computing as PEFT does, because the
    conditions are asked at each call; so do all layers in evaluation mode without gradients, and
    whatever ``torch.compile`` traces, which fuses PEFT's forward itself. A second call of ``fuse_``
    changes nothing.

    Args:
        model: a model with LoRA layers, changed in place.
        adapter: only the layers that hold this adapter; None for all.

    Returns:
        How many layers of the model, of those that hold ``adapter``, are fused now.

    Raises:
        ValueError: the model has no such adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    known = {*getattr(model, "peft_config", ()), *(name for layer in layers for name in layer.r)}
    if adapter is not None and adapter not in known:
        raise ValueError(
            f"adapter={adapter!r} is not an adapter of this model, which has {sorted(known)}. Name one of "
            "these, or pass None for all"
        )
    classes = _fused_classes()
    eligible = [layer for layer in layers if _is_eligible(layer, adapter, classes)]
    for layer in eligible:
        layer.__class__ = classes.get(type(layer), type(layer))
    return len(eligible)


def unfuse_(model: nn.Module) -> None:
    """Let all LoRA layers of the model compute as PEFT does; their class is PEFT's again."""
    stock = {fused: cls for cls, fused in _fused_classes().items()}
    for module in model.modules():
        if type(module) in stock:
            module.__class__ = stock[type(module)]


def _fused_classes() -> dict[type, type]:
    """For each of PEFT's classes that can be fused, the class that is.

    bitsandbytes is slow to import, so its layers are thought of only where PEFT has imported it.
    """
    if "peft.tuners.lora.bnb" not in sys.modules:
        return {Linear: FusedLinear}
    from peft.tuners.lora import bnb

    from dynlora.fused.quantised import FusedLinear4bit, FusedLinear8bitLt

    return {
        Linear: FusedLinear,
        bnb.Linear4bit: FusedLinear4bit,
        bnb.Linear8bitLt: FusedLinear8bitLt,
    }


def _is_eligible(layer: Any, adapter: str | None, classes: dict[type, type]) -> bool:
    """Whether some adapter of the layer (or this one) can take the fused path in an ordinary call.

    Exact classes: a subclass of PEFT's layer has a forward of its own, and so has a subclass of
    ``nn.Linear``.
    """
    if type(layer) not in {*classes, *classes.values()}:
        return False
    if isinstance(layer, Linear) and type(layer.base_layer) is not nn.Linear:
        return False
    names = layer.lora_A.keys() if adapter is None else {adapter} & layer.lora_A.keys()
    return any(name not in layer.lora_variant for name in names)
