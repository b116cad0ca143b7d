"""The paper's parametrisation as a PEFT method; importing this registers it with PEFT."""

from dynlora.gated.model import DynLoraModel

__all__ = ["DynLoraModel"]
