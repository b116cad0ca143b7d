"""axolotl's plugin: ``plugins: [dynlora.integrations.axolotl.DynLoraPlugin]`` and keys ``dynlora_...``."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import create_model
from transformers import TrainerCallback

from dynlora.allocation import Settings
from dynlora.callback import DynLoraCallback

PREFIX = "dynlora_"
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


_OF_THE_CALLBACK = {"preset": str, "eval_batches": int, "freeze_on_stop": bool}
_KEYS: dict[str, Any] = {
    PREFIX + name: (kind | None, None)
    for name, kind in (get_type_hints(Settings) | _OF_THE_CALLBACK).items()
    if name != "total_steps"  # the Trainer knows it
}
DynLoraArgs: Any = create_model("DynLoraArgs", __module__=__name__, **_KEYS)
"""Keys of the YAML file; each is DynLoraCallback's argument of that name, and None is its default."""


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
