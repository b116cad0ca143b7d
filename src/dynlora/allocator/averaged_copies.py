"""Copies of a model, such as averaged weights (EMA, SWA), that shrink when it does."""

from collections.abc import Sequence

import torch
from peft import LoraConfig
from torch import nn

from dynlora.allocator.compaction import compact_
from dynlora.allocator.masks import Masks
from dynlora.lora.components import LoraComponents, find_components
from dynlora.lora.configs import swap_config_


class AveragedCopies:
    """The copies that follow one adapter.

    Args:
        adapter: its name, in the model and in every copy.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._copies: list[tuple[nn.Module, list[LoraComponents]]] = []

    @property
    def models(self) -> list[nn.Module]:
        """The copies."""
        return [copy for copy, _ in self._copies]

    def add(self, copy: nn.Module, original: Sequence[LoraComponents]) -> None:
        """Note down a copy.

        Args:
            copy: holds the adapter, wrapped or not.
            original: the modules of the model itself.

        Raises:
            ValueError: the copy has no such adapter, or its modules have other ranks.
        """
        modules = find_components(copy, self.adapter)
        ours = [(m.name, m.rank) for m in original if not m.is_dropped]
        if [(m.name, m.rank) for m in modules] != ours:
            raise ValueError(
                f"copy={type(copy).__name__} does not hold adapter {self.adapter!r} with the shapes that "
                "the model has now. Pass an AveragedModel or a deep copy of this model."
            )
        self._copies.append((copy, modules))

    @torch.no_grad()
    def mask_like_(self, original: Sequence[LoraComponents]) -> None:
        """Let the same components be dead in every copy."""
        by_name = {m.name: m for m in original}
        for _, modules in self._copies:
            for copied in modules:
                copied.live = by_name[copied.name].live.to(copied.live.device, copy=True)
            Masks(modules).apply_()

    def compact_(self, ragged: LoraConfig) -> None:
        """Cut every copy down to its live components, described by ``ragged``."""
        for copy, modules in self._copies:
            compact_(modules, None)
            swap_config_(copy, self.adapter, ragged)
