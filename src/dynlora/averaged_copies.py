"""Copies of a model, such as averaged weights (EMA, SWA), that shrink when it does."""

from collections.abc import Sequence

from torch import nn

from dynlora.adapter.components import GatedLayer, find_gated_layers
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.fold import swap_config_
from dynlora.compaction import compact_


class AveragedCopies:
    """The copies that follow one adapter.

    Args:
        adapter: its name, in the model and in every copy.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._copies: list[tuple[nn.Module, list[GatedLayer]]] = []

    def add(self, copy: nn.Module, original: Sequence[GatedLayer]) -> None:
        """Note down a copy.

        Args:
            copy: holds the adapter, wrapped or not.
            original: the gated layers of the model itself.

        Raises:
            ValueError: the copy has no such adapter, or its modules have other ranks.
        """
        layers = find_gated_layers(copy, self.adapter)
        ours = [(m.name, m.num_components) for m in original]
        if [(m.name, m.num_components) for m in layers] != ours:
            raise ValueError(
                f"copy={type(copy).__name__} does not hold adapter {self.adapter!r} with the shapes that "
                "the model has now. Pass the AveragedModel, or deep copy, of this very model."
            )
        self._copies.append((copy, layers))

    def mask_like_(self, original: Sequence[GatedLayer]) -> None:
        """Let the same components be dead in every copy."""
        for _, layers in self._copies:
            for copied, gated in zip(layers, original, strict=True):
                copied.live.copy_(gated.live)
                copied.gate.mul_(gated.live.to(copied.gate.device))

    def compact_(self, ragged: DynLoraConfig) -> None:
        """Cut every copy down to its live components, described by ``ragged``."""
        for copy, layers in self._copies:
            compact_(layers, None)
            swap_config_(copy, self.adapter, ragged)
