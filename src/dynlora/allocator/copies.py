"""Copies of the adapter outside the model, such as averages: those that shrink with it, and others."""

import gc
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dynlora.allocator.compaction import compact_
from dynlora.allocator.masks import Masks
from dynlora.lora.components import LoraComponents, find_components
from dynlora.lora.configs import swap_config_


class AveragedCopies:
    """The copies of a model that follow one adapter, which has one name in all of them."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._copies: list[tuple[nn.Module, list[LoraComponents]]] = []

    def add(self, copy: nn.Module, original: Sequence[LoraComponents]) -> None:
        """Note down a copy; ValueError if it lacks the adapter, or its modules have other ranks."""
        modules = find_components(copy, self.adapter)
        ours = [(m.name, m.rank) for m in original if not m.is_dropped]
        if [(m.name, m.rank) for m in modules] != ours:
            raise ValueError(
                f"copy={type(copy).__name__} does not hold adapter {self.adapter!r} with the shapes that "
                "the model has now. Pass an AveragedModel or a deep copy of this model."
            )
        self._copies.append((copy, modules))

    def by_name(self) -> list[dict[str, LoraComponents]]:
        """The modules of each copy by their names."""
        return [{m.name: m for m in modules} for _, modules in self._copies]

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

    def warn_of_others(self, modules: Sequence[LoraComponents]) -> None:
        """Warn if as many other tensors as the adapter has parameters have their shapes.

        An EMA, a Lookahead optimizer or a snapshot keeps copies that no hook can find; that there are so
        many tensors of these shapes is the only trace of them. Parameters of other models, gradients and
        the state of optimizers do not count. The modules are not yet cut.
        """
        shrinking = [m for m in modules if not m.is_dropped and not bool(m.live.all())]
        expected = Counter(tuple(f.parameter.shape) for m in shrinking for f in m.factors)
        if not expected:
            return
        followers = {id(module) for copy, _ in self._copies for module in copy.modules()}
        found = Counter(tuple(tensor.shape) for tensor in _possible_copies(followers))
        if all(found[shape] >= count for shape, count in expected.items()):
            warnings.warn(
                f"{expected.total()} tensors outside the model have the shapes of the adapter's "
                "parameters, which shrink now. An average (EMA), a Lookahead optimizer or a snapshot that "
                "is combined with them later will not fit: let a copied model shrink along with "
                "allocator.also_compact(copy), or keep all shapes until the end with compact=False.",
                stacklevel=2,
            )


def _possible_copies(followers: set[int]) -> list[Tensor]:
    """Tensors that may be copies of parameters, but for those of models with these ids."""
    things = gc.get_objects()  # asked by type(): isinstance() may run code of theirs
    known: set[int] = set()
    for optimizer in (thing for thing in things if issubclass(type(thing), Optimizer)):
        groups = [optimizer.state.values(), *(s.values() for s in optimizer.state.values())]
        known |= {id(value) for group in groups for value in group}
    known |= {id(thing.grad) for thing in things if type(thing) is nn.Parameter}
    averages = [t for t in things if issubclass(type(t), AveragedModel) and id(t) not in followers]
    plain = [thing for thing in things if type(thing) is Tensor and id(thing) not in known]
    return [*plain, *(p for average in averages for p in average.parameters())]
