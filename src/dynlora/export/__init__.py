"""Trained adapter in; plain LoRA or merged weights on disk out."""

from dynlora.export.convert import Export, export_adapter
from dynlora.export.plain import export_lora

__all__ = ["Export", "export_adapter", "export_lora"]
