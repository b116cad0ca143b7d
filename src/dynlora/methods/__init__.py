"""The ways to adapt a model that a recipe's field ``method`` chooses from.

Each is one function ``(AdapterOptions, Target) -> Adapted``. All get the same head, data order,
number of steps and budget; the budget counts adapter parameters without the head.
"""

from collections.abc import Callable

from dynlora.methods.adalora import adalora
from dynlora.methods.adapted import Adapted, Target
from dynlora.methods.bottleneck import houlsby, pfeiffer
from dynlora.methods.dynamic import dynlora, gated, random
from dynlora.methods.lora import lora, lora_svd
from dynlora.methods.options import AdapterOptions
from dynlora.methods.whole_model import bitfit, full

METHODS: dict[str, Callable[[AdapterOptions, Target], Adapted]] = {
    "dynlora": dynlora,
    "lora": lora,
    "adalora": adalora,
    "full": full,
    "bitfit": bitfit,
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
    "gated": gated,
    "random": random,
    "lora-svd": lora_svd,
}

__all__ = ["METHODS", "Adapted", "AdapterOptions", "Target"]
