"""Trained adapter in, plain LoRA on disk out."""

from dynlora.export.plain import export_lora

__all__ = ["export_lora"]
