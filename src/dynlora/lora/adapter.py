"""One adapter of a model as a whole: its modules, and the config that describes them at any time."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from dynlora._private import ConvNd
from dynlora.adapter_files.format import VARIANTS
from dynlora.allocation import Settings, settings_from
from dynlora.lora.configs import (
    ragged_config,
    refuse_unsaved_biases,
    rewrites_base,
    swap_config_,
)
from dynlora.lora.follow import AdapterStart, CheckpointFollower


def refuse_variants(
    config: LoraConfig,
    reasons: Mapping[str, str],
    *,
    beside: str = "rank allocation",
    instead: str = "train without dynlora",
) -> None:
    """Refuse a config that sets one of the fields in ``reasons``, and say what to do ``instead``."""
    for field, reason in reasons.items():
        if value := getattr(config, field, None):
            raise ValueError(
                f"{field}={value!r} cannot be combined with {beside}: {reason}. Leave {field} at its "
                f"default, or {instead}."
            )


class LoraAdapter:
    """A stock LoRA whose ranks are allocated.

    Args:
        model: holds the adapter, wrapped or not.
        start: the adapter as it was when the run began; its config is never changed, the model gets
            copies.
    """

    def __init__(self, model: nn.Module, start: AdapterStart) -> None:
        self.model = model
        self.start = start
        self._follower: CheckpointFollower | None = None

    def settings(self, given: dict[str, Any], preset: str | None) -> Settings:
        """The settings of the run, from what the user gave."""
        return settings_from(given, preset=preset, where="RankAllocator")

    def check(self) -> None:
        """Refuse variants of LoRA and kinds of modules that have no components to compare."""
        refuse_variants(self.start.config, VARIANTS)
        refuse_unsaved_biases(self.start.config)
        for module in self.start.modules:
            base = module.layer.get_base_layer()
            if isinstance(base, ConvNd) and base.groups > 1:
                raise ValueError(
                    f"module {module.name!r} is a convolution with groups={base.groups}: its components do "
                    "not reach all outputs and cannot be removed one by one. Name it in exclude_modules."
                )

    @property
    def must_keep_shapes(self) -> str | None:
        """Why the adapter's shapes must stay those of the start; None if they may change."""
        if not rewrites_base(self.start.config):
            return None
        start = self.start.config.init_lora_weights
        return (
            f"init_lora_weights={start!r} changed the base weights according to the initial ranks, and "
            "PEFT does so again at each load, so pruned components stay in the adapter as zeros. Save with "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) to get a LoRA of "
            "the unchanged base, then make it smaller with `dynlora shrink`."
        )

    def follow_checkpoints(self) -> None:
        """Let the model take the ranks of the checkpoints that it loads, until ``leave``."""
        if not self.must_keep_shapes:
            self._follower = CheckpointFollower(self.model, self.start)

    def describe_ranks_(self) -> LoraConfig:
        """Give the model the config of the modules' present ranks."""
        ragged = ragged_config(self.model, self.start.config, self.start.modules)
        swap_config_(self.model, self.start.name, ragged)
        return ragged

    def leave(self) -> None:
        """Take all hooks off the model."""
        if self._follower is not None:
            self._follower.remove()

    def finish_(self) -> dict[str, int]:
        """Leave a plain LoRA without pruned components, with the same function; returns ranks by name."""
        ranks = {m.name: int(m.live.sum()) for m in self.start.modules}
        is_sharded = any(m.is_sharded for m in self.start.modules)
        if self.must_keep_shapes or is_sharded:
            return ranks
        if any(not bool(m.live.all()) for m in self.start.modules):
            for module in self.start.modules:
                if not module.is_dropped and not bool(module.live.all()):
                    module.keep_(module.kept())
            self.describe_ranks_()
        return ranks
