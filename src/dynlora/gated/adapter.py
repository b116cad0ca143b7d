"""A gated adapter as a whole, as a RankAllocator handles it."""

import copy
from typing import Any

from dynlora.adapter_files.format import OUT_PROJECTION
from dynlora.adapter_files.plain_config import exact_key
from dynlora.allocation import Settings
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.fold import finalize_
from dynlora.lora.adapter import LoraAdapter
from dynlora.lora.components import LoraComponents
from dynlora.lora.configs import swap_config_


class GatedAdapter(LoraAdapter):
    """An adapter of DynLoraConfig whose ranks are allocated."""

    must_keep_shapes = None  # gated adapters draw A and B themselves

    def settings(self, given: dict[str, Any], preset: str | None) -> Settings:
        """The config's own.

        Raises:
            ValueError: settings are given beside it.
        """
        if given or preset:
            given = {**given, **({"preset": preset} if preset else {})}
            raise ValueError(
                f"{', '.join(f'{k}={v!r}' for k, v in sorted(given.items()))} must not be given beside a "
                "DynLoraConfig, which holds the settings itself. Set them there, or use a LoraConfig."
            )
        config: DynLoraConfig = self.start.config
        return config.settings()

    def check(self) -> None:
        """As for a stock LoRA; gates stop waiting for an allocator."""
        super().check()
        for module in self.start.modules:
            if not module.is_dropped:
                vars(module.gate).pop("awaits_allocator", None)

    def follow_checkpoints(self) -> None:
        """Nothing: gated layers take the ranks that they load by themselves."""

    def describe_ranks_(self) -> DynLoraConfig:
        """Give the model a config from which an adapter of the modules' present ranks can be rebuilt.

        The scaling of every module stays lora_alpha / init_r, written as alpha_pattern. A module that
        fell to rank 0 is named with rank 0, so that a resumed run still counts it. Of the two halves of
        MultiheadAttention the larger is described; loading gives each the rank that was saved.
        """
        named: dict[str, LoraComponents] = {}
        for half in self.start.modules:
            name = exact_key(half.name.removesuffix(OUT_PROJECTION))
            if name not in named or half.rank > named[name].rank:
                named[name] = half
        ragged: DynLoraConfig = copy.copy(self.start.config)
        ragged.rank_pattern = {name: m.rank for name, m in named.items()}
        ragged.alpha_pattern = {  # a module of rank 0 is built with one component, to the same scaling
            name: m.layer.lora_alpha[m.adapter] if m.rank else m.layer.scaling[m.adapter]
            for name, m in named.items()
        }
        swap_config_(self.model, self.start.name, ragged)
        return ragged

    def finish_(self) -> dict[str, int]:
        """Fold the gates into B, unless the adapter is sharded; rank by module name, zeros included."""
        if any(m.is_sharded for m in self.start.modules):
            return super().finish_()
        return finalize_(self.model, self.start.name)
