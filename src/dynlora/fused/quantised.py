"""PEFT's layers over bitsandbytes' quantised ones; imported only once PEFT has imported those.

The base's product is bitsandbytes' own; the update is the fused one.
"""

from typing import Any

from peft.tuners.lora import bnb
from torch import Tensor

from dynlora.fused.conditions import fusable_update, is_training, update_dtype
from dynlora.fused.update import fused_update


class FusedLinear4bit(bnb.Linear4bit):  # type: ignore[misc]  # peft is untyped
    """PEFT's LoRA layer over 4-bit weights with a fused update."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) for x (..., in); further arguments are PEFT's and take its forward."""
        y = None if args or kwargs else _fused(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


class FusedLinear8bitLt(bnb.Linear8bitLt):  # type: ignore[misc]  # peft is untyped
    """PEFT's LoRA layer over 8-bit weights with a fused update."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) for x (..., in); further arguments are PEFT's and take its forward."""
        y = None if args or kwargs else _fused(self, x)
        return super().forward(x, *args, **kwargs) if y is None else y


def _fused(layer: Any, x: Tensor) -> Tensor | None:
    """What the layer computes for x, or None where only PEFT's forward can tell."""
    adapter = fusable_update(layer) if is_training(layer) else None
    dtype = None if adapter is None else update_dtype(layer, adapter, x)
    if adapter is None or dtype is None:
        return None
    return fused_update(layer, adapter, x, dtype)
