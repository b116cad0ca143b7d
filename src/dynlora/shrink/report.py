"""What ``shrink_adapter`` found and did."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from dynlora.adapter_files.python_source import FILLED_IN, as_python
from dynlora.shrink.choice import by_energy, same_rank
from dynlora.shrink.layout import Cut, Layout
from dynlora.shrink.search import Point

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of energy, one for each row of the table."""


@dataclass(frozen=True)
class Size:
    """An adapter of some size.

    Attributes:
        num_bytes: of ``adapter_model.safetensors``.
        parameters: of the low-rank factors.
        mean_rank: rank of the LoRA that has as many parameters with one rank everywhere.
        energy: share of Σσ² (scaling included) of the whole adapter.
        max_rank: largest rank of a module.
        dead: modules of rank 0.
        loss: on the held-out data, if there is any.
    """

    num_bytes: int
    parameters: int
    mean_rank: float
    energy: float
    max_rank: int
    dead: int
    loss: float | None = None


@dataclass(frozen=True)
class Kind:
    """Modules of one kind, the same in every layer.

    Attributes:
        name: of the modules, with the number of the layer blotted out.
        modules: how many.
        ranks: smallest and largest rank as trained.
        energy: share of the model's Σσ².
        needed: smallest and largest rank that holds 95 % of a module's own Σσ².
        largest: smallest and largest scaling · σ_max.
    """

    name: str
    modules: int
    ranks: tuple[int, int]
    energy: float
    needed: tuple[int, int]
    largest: tuple[float, float]


@dataclass(frozen=True)
class ShrinkReport:
    """What was found and what came out.

    Attributes:
        folder: the adapter that was read.
        out: the folder that was written, or None.
        before: the adapter as it is.
        after: what was chosen, or None if nothing was asked for.
        same_rank: the rank everywhere that needs at least as many bytes as what was chosen, or None.
        same_rank_size: its size, energy and loss.
        energies: size against energy, over the whole model.
        equal_ranks: size and energy of equal ranks everywhere, by rank.
        kinds: the spectra, by kind of module.
        ranks: rank of each module after the cut, zeros included.
        points: sizes whose loss was measured on the way.
        config: of the new adapter, as PEFT reads it.
        tensor_difference: largest relative difference of a ΔW read back.
        output_difference: largest difference of outputs with stock PEFT, in parts of the largest.
        seconds: of the decomposition, and of everything.
    """

    folder: Path
    before: Size
    energies: tuple[tuple[float, Size], ...]
    equal_ranks: dict[int, Size]
    kinds: tuple[Kind, ...]
    out: Path | None = None
    after: Size | None = None
    same_rank: int | None = None
    same_rank_size: Size | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    config: LoraConfig | None = None
    tensor_difference: float | None = None
    output_difference: float | None = None
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def config_source(self) -> str:
        """Python that makes the new adapter's ``LoraConfig``, ready to paste; "" if there is none."""
        return "" if self.config is None else as_python(_changed_fields(self.config))

    @property
    def conclusion(self) -> str:
        """What changed, in one sentence, and what an equal rank everywhere would have been."""
        before, after = self.before, self.after
        if after is None:
            return ""
        share = after.num_bytes / before.num_bytes
        text = f"{_mb(before)} -> {_mb(after)} ({share:.0%}), {_quality(before, after)}"
        if self.same_rank is not None and self.same_rank_size is not None:
            rival = self.same_rank_size
            text += (
                f"; rank {self.same_rank} everywhere would have been {_mb(rival)}, "
                f"{_quality(before, rival)}"
            )
        return text + "."


def size_of(layout: Layout, cut: Cut, loss: float | None = None) -> Size:
    """Facts on a cut."""
    ranks = layout.ranks(cut)
    parameters = layout.parameters(cut)
    whole = sum(u.cost for u in layout.adapter.updates)
    return Size(
        num_bytes=layout.num_bytes(cut),
        parameters=parameters,
        mean_rank=parameters / whole,
        energy=layout.energy(cut),
        max_rank=max(ranks),
        dead=ranks.count(0),
        loss=loss,
    )


def size_as_read(layout: Layout, loss: float | None = None) -> Size:
    """Facts on the adapter as it lies in its folder."""
    ranks = [u.rank for u in layout.adapter.updates]
    parameters = sum(u.cost * u.rank for u in layout.adapter.updates)
    return Size(
        num_bytes=(layout.adapter.folder / "adapter_model.safetensors").stat().st_size,
        parameters=parameters,
        mean_rank=parameters / sum(u.cost for u in layout.adapter.updates),
        energy=1.0,
        max_rank=max(ranks),
        dead=0,
        loss=loss,
    )


def energy_table(layout: Layout) -> tuple[tuple[float, Size], ...]:
    """Size against share of energy."""
    return tuple((share, size_of(layout, by_energy(share, layout.spectra))) for share in SHARES)


def equal_rank_table(layout: Layout) -> dict[int, Size]:
    """Size and energy of ranks 1, 2, 4 … below the largest, everywhere."""
    largest = max(u.rank for u in layout.adapter.updates)
    ranks = [2**i for i in range(largest.bit_length()) if 2**i < largest]
    return {rank: size_of(layout, same_rank(rank, layout.spectra)) for rank in ranks}


def kinds(layout: Layout) -> tuple[Kind, ...]:
    """The spectra of the modules, summed up by kind."""
    total = sum(float(s.energy.sum()) for s in layout.spectra)
    needed = by_energy(0.95, layout.spectra, per_module=True)
    by_name: dict[str, list[int]] = {}
    for place, update in enumerate(layout.adapter.updates):
        by_name.setdefault(re.sub(r"\d+", "*", update.name), []).append(place)
    found = []
    for name, places in by_name.items():
        spectra = [layout.spectra[p] for p in places]
        largest = [float(s.energy[0].sqrt()) for s in spectra]
        found.append(
            Kind(
                name=name,
                modules=len(places),
                ranks=_range([s.update.rank for s in spectra]),
                energy=sum(float(s.energy.sum()) for s in spectra) / total,
                needed=_range([int(needed[p].sum()) for p in places]),
                largest=(min(largest), max(largest)),
            )
        )
    return tuple(found)


def _range(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _mb(size: Size) -> str:
    """Megabytes with three digits that count.

    >>> _mb(Size(8_123_456, 0, 0, 0, 0, 0)), _mb(Size(1234, 0, 0, 0, 0, 0))
    ('8.12 MB', '0.00123 MB')
    """
    return f"{size.num_bytes / 1e6:.3g} MB"


def _quality(before: Size, after: Size) -> str:
    if before.loss is None or after.loss is None:
        return f"{after.energy:.1%} of the energy"
    change = after.loss / before.loss - 1
    return f"loss {before.loss:.3f} -> {after.loss:.3f} ({change:+.1%})"


def _changed_fields(config: LoraConfig) -> dict[str, Any]:
    """Rank, alpha and what differs from PEFT's defaults, without what PEFT fills in, as plain data."""
    defaults = LoraConfig().to_dict()
    values = {n: sorted(v) if isinstance(v, set) else v for n, v in config.to_dict().items()}
    changed = {
        name: value
        for name, value in values.items()
        if name not in FILLED_IN and (name in {"r", "lora_alpha"} or value != defaults.get(name))
    }
    if config.task_type is not None:
        changed["task_type"] = str(getattr(config.task_type, "value", config.task_type))
    return changed
