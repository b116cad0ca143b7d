"""dynlora: DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024), on any PEFT LoRA.

Train a LoRA as you do, with one argument more; what comes out is a plain, smaller LoRA. This is not
NVIDIA's weight-decomposed DoRA.

The first use of a name below imports torch and PEFT, which takes seconds; ``import dynlora`` alone does
not, so that ``dynlora --help`` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynlora.allocator import RankAllocator
    from dynlora.allocator.dem import dem_loss
    from dynlora.callback import DynLoraCallback, last_checkpoint
    from dynlora.errors import AdapterFileError, CannotShrinkError, DynLoraError, NotFiniteError
    from dynlora.export.plain import export_lora
    from dynlora.gated.config import DynLoraConfig
    from dynlora.gated.fold import finalize_
    from dynlora.gated.model import DynLoraModel
    from dynlora.lora.rotation import warm_start_

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "CannotShrinkError",
    "DynLoraCallback",
    "DynLoraConfig",
    "DynLoraError",
    "DynLoraModel",
    "NotFiniteError",
    "RankAllocator",
    "dem_loss",
    "export_lora",
    "finalize_",
    "last_checkpoint",
    "warm_start_",
]

_PLACES = {
    "AdapterFileError": "errors",
    "CannotShrinkError": "errors",
    "DynLoraCallback": "callback",
    "DynLoraConfig": "gated.config",
    "DynLoraError": "errors",
    "DynLoraModel": "gated.model",
    "NotFiniteError": "errors",
    "RankAllocator": "allocator",
    "dem_loss": "allocator.dem",
    "export_lora": "export.plain",
    "finalize_": "gated.fold",
    "last_checkpoint": "callback",
    "warm_start_": "lora.rotation",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("_"))])
