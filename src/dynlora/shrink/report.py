"""What ``shrink_adapter`` found and did."""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig

from dynlora.adapter_files.plain_config import as_python
from dynlora.lora.configs import recorded_fields
from dynlora.shrink.choice import by_energy
from dynlora.shrink.search import Point, gain_lost
from dynlora.shrink.spectrum import Cut, Spectra

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of energy, one for each row of the table."""


@dataclass(frozen=True)
class Size:
    """An adapter of some size.

    Attributes:
        num_bytes: of ``adapter_model.safetensors``.
        parameters: of the low-rank factors.
        mean_rank: rank of the LoRA that has as many parameters with one rank everywhere.
        energy: 1 − ‖ΔW − cut‖² / ‖ΔW‖², scaling included: of singular triplets the share of Σσ².
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

    @property
    def megabytes(self) -> str:
        """10⁶ bytes, three digits that count."""
        return f"{self.num_bytes / 1e6:.3g} MB"


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
        loss_without: on the held-out data with no component, if there is any: of the base, with what
            was trained beside the LoRA.
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
    out: Path | None = None
    after: Size | None = None
    same_rank: int | None = None
    same_rank_size: Size | None = None
    loss_without: float | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    config: LoraConfig | None = None
    tensor_difference: float | None = None
    output_difference: float | None = None
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def config_source(self) -> str:
        """Python that makes the new adapter's ``LoraConfig``, ready to paste; "" if there is none."""
        return "" if self.config is None else as_python(recorded_fields(self.config))

    @property
    def conclusion(self) -> str:
        """What changed, in one sentence, and what an equal rank everywhere would have been."""
        before, after, rival = self.before, self.after, self.same_rank_size
        if after is None:
            return ""
        share = after.num_bytes / before.num_bytes
        text = f"{before.megabytes} -> {after.megabytes} ({share:.0%}), {self._quality(after)}"
        if rival is not None:
            text += (
                f"; rank {self.same_rank} everywhere would have been {rival.megabytes}, "
                f"{self._quality(rival)}"
            )
        return text + "."

    def _quality(self, size: Size) -> str:
        whole, without = self.before.loss, self.loss_without
        if whole is None or without is None or size.loss is None:
            return f"{size.energy:.1%} of the energy"
        if whole < without:
            meaning = f"{gain_lost(size.loss, whole, without):z.1%} of the gain lost"
        else:
            meaning = f"{without:.3f} without the adapter"
        return f"loss {whole:.3f} -> {size.loss:.3f} ({meaning})"


def size_of(spectra: Spectra, cut: Cut, loss: float | None = None) -> Size:
    """Facts on a cut."""
    ranks, parameters = spectra.ranks(cut), spectra.parameters(cut)
    return Size(
        num_bytes=spectra.num_bytes(cut),
        parameters=parameters,
        mean_rank=parameters / spectra.cost,
        energy=spectra.energy(cut),
        max_rank=max(ranks),
        dead=ranks.count(0),
        loss=loss,
    )


def size_as_read(spectra: Spectra, num_bytes: int, loss: float | None = None) -> Size:
    """Facts on the adapter as it lies in its folder."""
    ranks = [update.rank for update in spectra.adapter.updates]
    parameters = sum(update.cost * update.rank for update in spectra.adapter.updates)
    return Size(num_bytes, parameters, parameters / spectra.cost, 1.0, max(ranks), 0, loss)


def energy_table(spectra: Spectra) -> tuple[tuple[float, Size], ...]:
    """Size against share of energy."""
    return tuple((share, size_of(spectra, by_energy(spectra, share))) for share in SHARES)


def equal_rank_table(spectra: Spectra) -> dict[int, Size]:
    """Size and energy of ranks 1, 2, 4 … below the largest, everywhere."""
    largest = max(update.rank for update in spectra.adapter.updates)
    ranks = [2**i for i in range(largest.bit_length()) if 2**i < largest]
    return {rank: size_of(spectra, spectra.same_rank(rank)) for rank in ranks}
