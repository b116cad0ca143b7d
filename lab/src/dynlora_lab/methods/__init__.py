"""The ways to adapt a model that a recipe's field ``method`` chooses from.

Each is one function ``(AdapterOptions, Target) -> Adapted``. All get the same head, data order,
number of steps and budget; the budget counts adapter parameters without the head.
"""

from collections.abc import Callable

from dynlora.allocation import Settings
from dynlora_lab.methods.adalora import adalora
from dynlora_lab.methods.adapted import Adapted, Target
from dynlora_lab.methods.bottleneck import houlsby, pfeiffer
from dynlora_lab.methods.cuts import lora_cuts
from dynlora_lab.methods.dynamic import dynlora, dynlora_auto, dynlora_gated, gated, random
from dynlora_lab.methods.fisher import fim
from dynlora_lab.methods.lora import lora, lora_initial, lora_svd
from dynlora_lab.methods.options import AdapterOptions
from dynlora_lab.methods.squeeze import cont_squeeze, dynlora_rotated, in_squeeze
from dynlora_lab.methods.whole_model import bitfit, full

METHODS: dict[str, Callable[[AdapterOptions, Target], Adapted]] = {
    "dynlora": dynlora,
    "dynlora-auto": dynlora_auto,
    "dynlora-gated": dynlora_gated,
    "lora": lora,
    "lora-initial": lora_initial,
    "adalora": adalora,
    "full": full,
    "bitfit": bitfit,
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
    "gated": gated,
    "random": random,
    "lora-svd": lora_svd,
    "lora-cuts": lora_cuts,
    "cont-squeeze": cont_squeeze,
    "in-squeeze": in_squeeze,
    "dynlora-rotated": dynlora_rotated,
    "fim": fim,
}

DEFAULTS: dict[str, dict[str, float]] = {
    "dynlora-auto": {"prune_end": Settings(target_r="auto").prune_end},
}
"""Fields of AdapterOptions whose defaults are a method's own, as the library's are."""

__all__ = ["DEFAULTS", "METHODS", "Adapted", "AdapterOptions", "Target"]
