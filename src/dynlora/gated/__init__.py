"""The paper's parametrisation as a PEFT method; importing this registers it with PEFT."""

from dynlora.gated.adapter import GatedAdapter
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.model import DynLoraModel

DynLoraConfig.adapter_class = GatedAdapter  # the config itself knows nothing of allocation

__all__ = ["DynLoraModel"]
