"""axolotl's plugin: ``plugins: [dynlora.integrations.axolotl.DynLoraPlugin]`` and keys ``dynlora_...``."""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from dynlora.callback import DynLoraCallback

PREFIX = "dynlora_"
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class DynLoraArgs(BaseModel):
    """Keys of the YAML file; each is DynLoraCallback's argument of that name, and None is its default."""

    dynlora_target_r: float | str | None = None
    dynlora_tolerance: float | None = None
    dynlora_min_r: int | None = None
    dynlora_prune_start: float | None = None
    dynlora_prune_end: float | None = None
    dynlora_prune_interval: int | None = None
    dynlora_ema_beta: float | None = None
    dynlora_importance: str | None = None
    dynlora_budget: str | None = None
    dynlora_revival: bool | None = None
    dynlora_dem_weight: float | None = None
    dynlora_compact: bool | None = None
    dynlora_preset: str | None = None
    dynlora_eval_batches: int | None = None
    dynlora_freeze_on_stop: bool | None = None


class DynLoraPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is no dependency
    """Adds a DynLoraCallback to axolotl's trainer before it is built, so that resuming works.

    Raises:
        TypeError: a key ``dynlora_...`` is unknown.
        ValueError: ``dynlora_target_r`` is missing, a value is out of range, or ``dynlora_min_r: 0`` is
            asked of a run whose kernels read the factors of every module.
    """

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Refuse what is wrong with the keys before a model is loaded."""
        callback_of(cfg)

    def get_input_args(self) -> str:
        """Where axolotl finds the keys."""
        return f"{__name__}.{DynLoraArgs.__name__}"

    def add_callbacks_pre_trainer(
        self, cfg: Mapping[str, Any], model: Any
    ) -> list[TrainerCallback]:
        """The callback of this run."""
        return [callback_of(cfg)]


def callback_of(cfg: Mapping[str, Any]) -> DynLoraCallback:
    """The callback that the keys ask for.

    axolotl's LoRA kernels read ``lora_A`` of every module, which one of rank 0 does not have: where they
    are on, which axolotl does by itself for some models, ``min_r`` is 1 unless it is given.
    """
    given = {
        key.removeprefix(PREFIX): value
        for key, value in cfg.items()
        if key.startswith(PREFIX) and value is not None
    }
    if "target_r" not in given:
        raise ValueError(
            "dynlora_target_r is missing: the plugin needs the mean rank per adapted module at the end, "
            "such as dynlora_target_r: 8, or 'auto'. Without dynlora, take the plugin out of plugins."
        )
    kernels = [name for name in _KERNELS if cfg.get(name)]
    if kernels and given.setdefault("min_r", 1) == 0:
        raise ValueError(
            f"dynlora_min_r=0 may leave modules without an adapter, and {', '.join(kernels)} read the "
            "adapter of every module. Set dynlora_min_r: 1, or switch the kernels off: "
            f"{kernels[0]}: false."
        )
    return DynLoraCallback(**given)
