"""A gated adapter as a whole, as a RankAllocator handles it."""

from typing import Any

from dynlora.allocation import Settings
from dynlora.gated.config import DynLoraConfig
from dynlora.gated.fold import finalize_
from dynlora.lora.adapter import LoraAdapter


class GatedAdapter(LoraAdapter):
    """An adapter of DynLoraConfig whose ranks are allocated."""

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

    def finish_(self) -> dict[str, int]:
        """Fold the gates into B, unless the adapter is sharded; rank by module name, zeros included."""
        if any(m.is_sharded for m in self.start.modules):
            return super().finish_()
        return finalize_(self.model, self.start.name)
