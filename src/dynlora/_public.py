"""What ``dynlora`` exports, imported at the first use of one of its names; see its ``__getattr__``."""

from dynlora.adapter.adapter_file import AdapterFileError
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.fold import finalize_
from dynlora.adapter.penalty import dem_loss
from dynlora.adapter.tuner import DynLoraModel
from dynlora.adapter.warm_start import accept_dynlora_, warm_start_
from dynlora.allocator import RankAllocator
from dynlora.export.plain import export_lora
from dynlora.trainer import DynLoraCallback, last_checkpoint

__all__ = [
    "AdapterFileError",
    "DynLoraCallback",
    "DynLoraConfig",
    "DynLoraModel",
    "RankAllocator",
    "accept_dynlora_",
    "dem_loss",
    "export_lora",
    "finalize_",
    "last_checkpoint",
    "warm_start_",
]
