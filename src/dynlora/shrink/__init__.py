"""A finished LoRA made smaller without training."""

from dynlora.shrink.report import ShrinkReport
from dynlora.shrink.shrink import shrink_adapter

__all__ = ["ShrinkReport", "shrink_adapter"]
