"""DynLoraCallback: rank allocation in transformers' Trainer and every trainer built on it."""

from dynlora.callback.callback import DynLoraCallback, last_checkpoint

__all__ = ["DynLoraCallback", "last_checkpoint"]
