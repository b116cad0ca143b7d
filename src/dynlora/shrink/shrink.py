"""Make a finished LoRA smaller without training."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from dynlora.adapter_files.whole_folder import whole_folder
from dynlora.shrink import report as facts
from dynlora.shrink.choice import (
    Method,
    by_energy,
    by_mean_rank,
    by_method,
    by_size,
    everything,
    same_rank,
)
from dynlora.shrink.held_out import HeldOut
from dynlora.shrink.layout import Cut, Layout
from dynlora.shrink.report import ShrinkReport, size_as_read, size_of
from dynlora.shrink.rows import read_rows
from dynlora.shrink.search import Point, search
from dynlora.shrink.source import read
from dynlora.shrink.spectrum import decompose
from dynlora.shrink.write import check_out, read_config, verify, write

DEFAULT_TOLERANCE = 0.01

Path_ = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class _Wish:
    """The one rule that was asked for, if any."""

    energy: float | None
    per_module: bool
    method: Method | None
    value: float | None
    mean_rank: float | None
    size_mb: float | None
    tolerance: float | None

    def check(self) -> None:
        given = {
            n: v
            for n, v in vars(self).items()
            if v is not None and n not in {"per_module", "value"}
        }
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given; each decides alone. Name one.")
        if (self.method is None) != (self.value is None):
            raise ValueError("method and value go together, as method='sv_fro', value=0.9.")
        if self.per_module and self.energy is None:
            raise ValueError("per_module goes with energy; name energy, as energy=0.95.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance} must be 0 or more: 0.01 is one percent.")

    def cut(self, layout: Layout) -> Cut | None:
        """The cut by spectra alone, or None if they do not decide."""
        if self.energy is not None:
            return by_energy(self.energy, layout.spectra, per_module=self.per_module)
        if self.method is not None and self.value is not None:
            return by_method(self.method, self.value, layout.spectra)
        if self.mean_rank is not None:
            return by_mean_rank(self.mean_rank, layout)
        return None if self.size_mb is None else by_size(self.size_mb, layout)


def shrink_adapter(
    folder: Path_,
    out: Path_ | None = None,
    *,
    energy: float | None = None,
    per_module: bool = False,
    method: Method | None = None,
    value: float | None = None,
    mean_rank: float | None = None,
    size_mb: float | None = None,
    model: str | None = None,
    data: Path_ | None = None,
    tolerance: float | None = None,
    uniform: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
) -> ShrinkReport:
    """Cut a finished LoRA by its singular values, or by what they mean for a held-out loss.

    Of every update ΔW = scaling · B A the singular triplets are known from QR of B and of Aᵀ and an SVD
    of the small core between them. One rule decides which stay. Without a rule the report holds the
    tables only, and nothing is written.

    Args:
        folder: a plain LoRA as PEFT wrote it.
        out: folder to write; None writes nothing.
        energy: share of Σσ² (scaling included) of the whole model to keep, with the fewest parameters.
        per_module: keep that share in each module by itself.
        method: kohya's ``sv_ratio``, ``sv_fro`` or ``sv_cumulative``, in each module by itself.
        value: of ``method``.
        mean_rank: keep what fits into the parameters of this rank everywhere.
        size_mb: keep what fits into a file of so many 10⁶ bytes.
        model: folder or hub id of the base model: to measure losses, and to verify what was written.
        data: .csv or .jsonl with held-out texts: column ``text``, for a classifier also ``label``.
        tolerance: keep the least whose loss on ``data`` is at most (1 + tolerance) times the whole
            adapter's. 0.01 if ``data`` is given and no other rule.
        uniform: give every module the largest kept rank, filled up with zeros.
        batch_size: texts in a batch.
        max_length: tokens of a text; longer ones are cut.

    Raises:
        FileNotFoundError: there is no adapter, or no data.
        FileExistsError: ``out`` exists.
        ValueError: the adapter is not a plain LoRA, or an argument is wrong.
        RuntimeError: what was written, read back, is not what it should be; nothing stays.
    """
    start = time.perf_counter()
    no_rule = all(rule is None for rule in (energy, method, mean_rank, size_mb))
    if data is not None and tolerance is None and no_rule:
        tolerance = DEFAULT_TOLERANCE
    wish = _Wish(energy, per_module, method, value, mean_rank, size_mb, tolerance)
    wish.check()
    _check_places(out=out, model=model, data=data, wish=wish)
    if out is not None:
        check_out(Path(out), Path(folder))
    rows = None if data is None else read_rows(Path(data))
    adapter = read(Path(folder))
    layout = Layout(adapter, [decompose(update) for update in adapter.updates], uniform=uniform)
    decomposed = time.perf_counter() - start
    if not any(bool(s.energy.any()) for s in layout.spectra):
        raise ValueError(
            f"{folder}: every B A is 0, so the adapter equals its base. Train it first."
        )
    held_out = None
    if model is not None:
        held_out = HeldOut(layout, model, rows, batch_size=batch_size, max_length=max_length)
    whole_loss = (
        None if rows is None or held_out is None else held_out.loss(everything(layout.spectra))
    )
    found = ShrinkReport(
        folder=Path(folder),
        before=size_as_read(layout, whole_loss),
        energies=facts.energy_table(layout),
        equal_ranks=facts.equal_rank_table(layout),
        kinds=facts.kinds(layout),
    )
    points: list[Point] = []
    cut = wish.cut(layout)
    if tolerance is not None and held_out is not None and whole_loss is not None:
        limit = whole_loss + tolerance * abs(whole_loss)
        cut, points = search(layout, held_out, limit=limit)
    if cut is not None:
        measured = held_out if rows is not None else None
        found = dataclasses.replace(
            found, points=tuple(points), **_chosen(layout, cut, measured),
            **_written(layout, cut, out, held_out),
        )  # fmt: skip
    return dataclasses.replace(found, seconds=(decomposed, time.perf_counter() - start))


def _check_places(*, out: Path_ | None, model: str | None, data: Path_ | None, wish: _Wish) -> None:
    """Folders and files that go together, checked before anything is read."""
    if (data is not None or wish.tolerance is not None) and model is None:
        raise ValueError("data and tolerance need the base: name model, a folder or a hub id.")
    if wish.tolerance is not None and data is None:
        raise ValueError("tolerance needs held-out texts: name data, a .csv or .jsonl.")
    rules = (wish.energy, wish.method, wish.mean_rank, wish.size_mb, wish.tolerance)
    if out is not None and not any(rule is not None for rule in rules):
        raise ValueError(
            "out was given, but no rule what to keep: name energy, method, mean_rank, size_mb, or "
            "model and data."
        )


def _chosen(layout: Layout, cut: Cut, held_out: HeldOut | None) -> dict[str, Any]:
    """Facts on the cut, and on the equal rank that needs at least as many bytes."""
    loss = None if held_out is None else held_out.loss(cut)
    after = size_of(layout, cut, loss)
    names = [update.name for update in layout.adapter.updates]
    chosen = {"after": after, "ranks": dict(zip(names, layout.ranks(cut), strict=True))}
    plain = dataclasses.replace(layout, uniform=False)
    for rank in range(1, max(u.rank for u in layout.adapter.updates)):
        rival = same_rank(rank, layout.spectra)
        if plain.num_bytes(rival) >= after.num_bytes:
            rival_loss = None if held_out is None else held_out.loss(rival)
            size = size_of(plain, rival, rival_loss)
            return {**chosen, "same_rank": rank, "same_rank_size": size}
    return chosen


def _written(
    layout: Layout, cut: Cut, out: Path_ | None, held_out: HeldOut | None
) -> dict[str, Any]:
    """Write and verify; nothing is left if that fails."""
    if out is None:
        return {}
    done: dict[str, Any] = {"out": Path(out)}
    with whole_folder(Path(out)) as temporary:
        write(temporary, layout.adapter.folder, layout.config_fields(cut), layout.tensors(cut))
        done["config"] = read_config(temporary)
        done["tensor_difference"] = verify(temporary, layout, cut)
        if held_out is not None:
            done["output_difference"] = held_out.verify(cut, temporary)
    return done
