"""Make a finished LoRA smaller without training."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from dynlora.adapter_files.folder import checked_source, read_config
from dynlora.adapter_files.format import WEIGHTS_FILE
from dynlora.adapter_files.updates import read
from dynlora.adapter_files.write import copy_processor, plain, write_adapter
from dynlora.errors import AdapterFileError, VerificationError
from dynlora.files import whole_folder
from dynlora.shrink import report as facts
from dynlora.shrink.choice import by_budget, by_energy, by_method
from dynlora.shrink.held_out import HeldOut
from dynlora.shrink.report import ShrinkReport
from dynlora.shrink.rows import read_rows
from dynlora.shrink.search import is_nearer_than_0, measured_orders, search
from dynlora.shrink.spectrum import Cut, Spectra, decompose

DEFAULT_TOLERANCE = 0.003

TOLERANCE = 1e-6
"""Relative to each ΔW, for factors in float32; half precision adds its own rounding."""

Path_ = str | os.PathLike[str]


def shrink_adapter(
    folder: Path_,
    out: Path_ | None = None,
    *,
    energy: float | None = None,
    per_module: bool = False,
    method: str | None = None,
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
    """Cut a finished LoRA by its singular values, or by what a held-out loss says of its components.

    Of every update ΔW = scaling · B A the singular triplets are known from QR of B and of Aᵀ and an SVD
    of the small core between them. With ``data``, components in the basis of the loss's curvature
    (``dynlora.lora.curvature``) are tried as well, where the rule is a size or a tolerance, and those that
    do better on ``data`` are taken. One rule decides which stay. Without a rule the report holds the
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
        tolerance: share of the adapter's gain on ``data`` that may be lost, in [0, 1): keep the least
            whose loss is at most whole + tolerance · (without − whole), the losses with the whole adapter
            and without any component. 0.003 if ``data`` is given and no other rule.
        uniform: give every module the largest kept rank, filled up with zeros.
        batch_size: texts in a batch.
        max_length: tokens of a text; longer ones are cut.

    Raises:
        FileNotFoundError: there is no adapter, or no data.
        FileExistsError: ``out`` exists.
        ValueError: the adapter is not a plain LoRA, an argument is wrong, or ``tolerance`` was to be
            met and the loss on ``data`` is no lower with the adapter than without.
        VerificationError: what was written, read back, is not what it should be; nothing stays.
    """
    start = time.perf_counter()
    rules = {"energy": energy, "method": method, "mean_rank": mean_rank, "size_mb": size_mb}
    if data is not None and tolerance is None and all(rule is None for rule in rules.values()):
        tolerance = DEFAULT_TOLERANCE
    given = [n for n, rule in {**rules, "tolerance": tolerance}.items() if rule is not None]
    _check_rules(given, per_module=per_module, method=method, value=value, tolerance=tolerance)
    if given == ["tolerance"] and (model is None or data is None):
        raise ValueError("tolerance needs the base and held-out texts: name model and data.")
    if data is not None and model is None:
        raise ValueError("data needs the base: name model, a folder or a hub id.")
    if out is not None:
        _check_out(Path(out), Path(folder), given)
    rows = None if data is None else read_rows(Path(data))
    spectra = _read(Path(folder), uniform=uniform)
    decomposed = time.perf_counter() - start
    held_out = None
    if model is not None:
        sizes = {"batch_size": batch_size, "max_length": max_length}
        held_out = HeldOut(spectra, Path(folder), model, rows, **sizes)
    measured = held_out if rows is not None else None
    losses = None
    if measured is not None:
        everything, nothing = spectra.everything, spectra.nothing
        losses = measured.loss(spectra, everything), measured.loss(spectra, nothing)
    loss, without = losses or (None, None)
    found = ShrinkReport(
        folder=Path(folder),
        before=facts.size_as_read(spectra, (Path(folder) / WEIGHTS_FILE).stat().st_size, loss),
        energies=facts.energy_table(spectra),
        equal_ranks=facts.equal_rank_table(spectra),
        loss_without=without,
    )
    cut: Cut | None = None
    basis = spectra  # the triplets that the cut is of
    if energy is not None:
        cut = by_energy(spectra, energy, per_module=per_module)
    elif method is not None and value is not None:
        cut = by_method(spectra, method, value)
    elif mean_rank is not None:
        basis, cut = _best_within(spectra, measured, "mean_rank", mean_rank)
    elif size_mb is not None:
        basis, cut = _best_within(spectra, measured, "size_mb", size_mb)
    elif tolerance is not None and measured is not None and losses is not None:
        if not losses[0] < losses[1]:
            raise ValueError(
                f"the held-out loss is {losses[0]:.4g} with the adapter and {losses[1]:.4g} without it: "
                f"nothing is gained on data={str(data)!r} of which tolerance={tolerance} could be a share. "
                "Look at these texts and their labels, or cut by energy, mean_rank or size_mb."
            )
        basis, cut, points = search(spectra, measured, *losses, tolerance=tolerance)
        found = dataclasses.replace(found, points=points)
    if cut is not None:
        done = _chosen(spectra, basis, cut, measured)
        if out is not None:
            done |= _written(basis, cut, Path(folder), Path(out), held_out)
        found = dataclasses.replace(found, **done)
    return dataclasses.replace(found, seconds=(decomposed, time.perf_counter() - start))


def _check_rules(
    given: list[str],
    *,
    per_module: bool,
    method: str | None,
    value: float | None,
    tolerance: float | None,
) -> None:
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were given; each decides alone. Name one.")
    if (method is None) != (value is None):
        raise ValueError("method and value go together, as method='sv_fro', value=0.9.")
    if per_module and given != ["energy"]:
        raise ValueError("per_module goes with energy; name energy, as energy=0.95.")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance} must be 0 or more and below 1: it is the share of the adapter's gain "
            "in held-out loss that may be lost, as 0.003."
        )


def _check_out(out: Path, folder: Path, given: list[str]) -> None:
    if not given:
        raise ValueError(
            "out was given, but no rule what to keep: name energy, method, mean_rank, size_mb, or "
            "model and data."
        )
    if out.resolve() == folder.resolve():
        raise FileExistsError(f"out={str(out)!r} is the adapter itself; name another folder.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} exists already; name a new folder or remove it.")


def _read(folder: Path, *, uniform: bool) -> Spectra:
    if read_config(checked_source(folder)).get("peft_type") == "DYNLORA":
        raise AdapterFileError(
            f"{folder} is a checkpoint with gates (peft_type DYNLORA). Make it a plain LoRA first: "
            f"dynlora export {folder}"
        )
    adapter = read(folder)
    spectra = Spectra(adapter, [decompose(update) for update in adapter.updates], uniform)
    if not any(bool(module.energy.any()) for module in spectra.modules):
        raise ValueError(
            f"{folder}: every B A is 0, so the adapter equals its base. Train it first."
        )
    return spectra


def _best_within(
    spectra: Spectra, held_out: HeldOut | None, name: str, value: float
) -> tuple[Spectra, Cut]:
    """The cut within a budget, by singular values, or by curvature if that loses less on the data."""
    if held_out is None:
        return spectra, by_budget(spectra, spectra.order(), name, value)
    orders = measured_orders(spectra, held_out).values()
    first, *others = [(basis, by_budget(basis, order, name, value)) for basis, order in orders]
    cuts = [first, *(cut for cut in others if is_nearer_than_0(*cut))]
    return min(cuts, key=lambda one: held_out.loss(*one))


def _chosen(spectra: Spectra, basis: Spectra, cut: Cut, held_out: HeldOut | None) -> dict[str, Any]:
    """Facts on the cut, and on the equal rank that needs at least as many bytes."""
    after = facts.size_of(basis, cut, None if held_out is None else held_out.loss(basis, cut))
    names = [update.name for update in spectra.adapter.updates]
    chosen = {"after": after, "ranks": dict(zip(names, basis.ranks(cut), strict=True))}
    plain_form = dataclasses.replace(spectra, uniform=False)
    for rank in range(1, max(update.rank for update in spectra.adapter.updates)):
        rival = spectra.same_rank(rank)
        if plain_form.num_bytes(rival) >= after.num_bytes:
            size = facts.size_of(
                plain_form, rival, None if held_out is None else held_out.loss(spectra, rival)
            )
            return {**chosen, "same_rank": rank, "same_rank_size": size}
    return chosen


def _written(
    spectra: Spectra, cut: Cut, folder: Path, out: Path, held_out: HeldOut | None
) -> dict[str, Any]:
    """Write and verify; nothing is left if that fails."""
    done: dict[str, Any] = {"out": out}
    with whole_folder(out) as temporary:
        adapter = spectra.cut(cut)
        write_adapter(temporary, *plain(adapter), adapter.pruned)
        copy_processor(folder, temporary)
        done["config"] = PeftConfig.from_pretrained(str(temporary))
        done["tensor_difference"] = verify(temporary, spectra, cut)
        if held_out is not None:
            done["output_difference"] = held_out.verify(spectra, cut, temporary)
    return done


@torch.no_grad()
def verify(folder: Path, spectra: Spectra, cut: Cut) -> float:
    """Read the folder back; the largest difference of a ΔW from the truncated one, relative to its norm."""
    written = {update.name: update for update in read(folder).updates}
    largest = 0.0
    for module, mask, rank in zip(spectra.modules, cut, spectra.ranks(cut), strict=True):
        if rank:
            name = module.update.name
            difference = module.difference(mask, written[name])
            limit = max(TOLERANCE, 2 * torch.finfo(written[name].a.dtype).eps)
            if not difference <= limit:
                raise VerificationError(
                    f"verification failed: the update of module {name!r} read back differs by "
                    f"{difference:.2g} of its norm, more than {limit:.2g}. Nothing was written."
                )
            largest = max(largest, difference)
    return largest
