"""dynlora: DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024), as a method of PEFT.

Train with a rank budget instead of a rank; what comes out is a plain, smaller LoRA adapter. This is
not NVIDIA's weight-decomposed DoRA.

The first use of a name below imports torch and PEFT, which takes seconds, and registers the method with
PEFT; ``import dynlora`` alone does neither, so that ``dynlora --help`` answers at once.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynlora._public import (
        AdapterFileError as AdapterFileError,
    )
    from dynlora._public import (
        DynLoraCallback as DynLoraCallback,
    )
    from dynlora._public import (
        DynLoraConfig as DynLoraConfig,
    )
    from dynlora._public import (
        DynLoraModel as DynLoraModel,
    )
    from dynlora._public import (
        RankAllocator as RankAllocator,
    )
    from dynlora._public import (
        accept_dynlora_ as accept_dynlora_,
    )
    from dynlora._public import (
        dem_loss as dem_loss,
    )
    from dynlora._public import (
        export_lora as export_lora,
    )
    from dynlora._public import (
        finalize_ as finalize_,
    )
    from dynlora._public import (
        last_checkpoint as last_checkpoint,
    )
    from dynlora._public import (
        warm_start_ as warm_start_,
    )

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


if not TYPE_CHECKING:  # to a type checker a name that is not above is a mistake

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'dynlora' has no attribute {name!r}")
        from dynlora import _public

        globals().update({public: getattr(_public, public) for public in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
