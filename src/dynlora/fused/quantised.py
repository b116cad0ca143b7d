"""PEFT's layers over bitsandbytes' quantised ones; imported only once PEFT has imported those.

The base's product is bitsandbytes' own; the update is the fused one.
"""

from typing import Any

from peft.tuners.lora import bnb
from torch import Tensor

from dynlora.fused.conditions import fusable_update, is_worthwhile, update_dtype
from dynlora.fused.linear import fused_update


class _FusedUpdate:
    """PEFT's LoRA layer over quantised weights; its update is fused wherever that computes the same."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out) for x (..., in); further arguments are PEFT's and take its forward."""
        is_plain_call = is_worthwhile(self) and not args and not kwargs
        adapter = fusable_update(self) if is_plain_call else None
        dtype = None if adapter is None else update_dtype(self, adapter, x)
        if adapter is None or dtype is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's class, beside it
        return fused_update(self, adapter, x, dtype)


class FusedLinear4bit(_FusedUpdate, bnb.Linear4bit):  # type: ignore[misc]  # peft is untyped
    """The same over 4-bit weights."""


class FusedLinear8bitLt(_FusedUpdate, bnb.Linear8bitLt):  # type: ignore[misc]  # peft is untyped
    """The same over 8-bit weights."""
