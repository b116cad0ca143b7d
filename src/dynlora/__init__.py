"""dynlora: DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024), as a method of PEFT.

Train with a rank budget instead of a rank; what comes out is a plain, smaller LoRA adapter. This is
not NVIDIA's weight-decomposed DoRA. Importing this package registers the method with PEFT.
"""

from dynlora.adapter.adapter_file import AdapterFileError
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.fold import finalize_
from dynlora.adapter.penalty import dem_loss
from dynlora.adapter.tuner import DynLoraModel
from dynlora.adapter.warm_start import accept_dynlora_, warm_start_
from dynlora.allocator import RankAllocator
from dynlora.export.plain import export_lora
from dynlora.trainer import DynLoraCallback, last_checkpoint

__version__ = "0.1.0"

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
