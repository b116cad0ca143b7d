"""A gated adapter as a whole, as a RankAllocator handles it."""

from typing import Any

from dynlora.allocation import Settings
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.configs import ragged_config
from dynlora.gated.fold import finalize_
from dynlora.gated.guard import stop_waiting
from dynlora.lora.adapter import LoraAdapter
from dynlora.lora.configs import swap_config_


class GatedAdapter(LoraAdapter):
    """An adapter of DynLoraConfig whose ranks are allocated."""

    @property
    def config(self) -> DynLoraConfig:
        """The adapter's config when the run began."""
        config: DynLoraConfig = self.start.config
        return config

    def settings(self, given: dict[str, Any], preset: str | None) -> Settings:
        """The config's own.

        Raises:
            ValueError: settings are given beside it.
        """
        if given or preset:
            names = (
                ", ".join(f"{k}={v!r}" for k, v in sorted(given.items())) or f"preset={preset!r}"
            )
            raise ValueError(
                f"{names} must not be given beside a DynLoraConfig, which holds the settings itself. Set "
                "them there, or use a LoraConfig."
            )
        return self.config.settings()

    def check(self) -> None:
        """Nothing more: DynLoraConfig has checked itself. Gates stop waiting for an allocator."""
        for module in self.start.modules:
            stop_waiting(module.layer, self.start.name)

    @property
    def must_keep_shapes(self) -> str | None:
        """None: gated adapters draw A and B themselves."""
        return None

    def follow_checkpoints(self) -> None:
        """Nothing: gated layers take the ranks that they load by themselves."""

    def describe_ranks_(self) -> DynLoraConfig:
        """Give the model the config of the modules' present ranks."""
        ragged = ragged_config(self.config, self.start.modules)
        swap_config_(self.model, self.start.name, ragged)
        return ragged

    def finish_(self) -> dict[str, int]:
        """Fold the gates into B, unless the adapter is sharded.

        Returns:
            Rank by module name, zeros included.
        """
        if any(m.is_sharded for m in self.start.modules):
            return {m.name: int(m.live.sum()) for m in self.start.modules}
        return finalize_(self.model, self.start.name)
