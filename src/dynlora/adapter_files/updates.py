"""An adapter folder read whole, without its base model: updates by module, and what lies beside them."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynlora.adapter_files.folder import checked_source, damaged, pruned_modules, read_config
from dynlora.adapter_files.format import (
    CONFIG_FILE,
    OUT_PROJECTION,
    PREFIX,
    REWRITING_STARTS,
    VARIANTS,
    WEIGHTS_FILE,
    factor_key,
    group_of,
    is_unknown_part,
    parameters_of,
    parse_key,
    ranks_in_config,
    scaling_of,
)
from dynlora.errors import AdapterFileError

_BIAS_OWNER = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_B|base_layer)\.\w*bias")

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of A and B."""


@dataclass(frozen=True)
class Update:
    """The low-rank update of one module: ΔW = scaling · B A, for each expert if there are several.

    Attributes:
        name: module name in the base model, with ``.base_layer`` where PEFT nests its layers.
        a: A as stored: (r, in), (r, in, kernel ...) or, for fused experts, (r · experts, in).
        b: B as stored: (out, r), (out, r, 1 ...) or (out, r · experts).
        scaling: what PEFT multiplies B A by.
        is_embedding: whether it is of an Embedding: A (r, vocabulary), B (dim, r).
        num_experts: experts that one pair of factors holds; 1 for every other layer.
        parameters: names of the bare parameters that are adapted (``target_parameters``), or none.
        has_bias: whether a bias of this module was trained, so that it must stay adapted.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    is_embedding: bool = False
    num_experts: int = 1
    parameters: tuple[str, ...] = ()
    has_bias: bool = False

    @property
    def group(self) -> str:
        """The module whose rank and alpha a config can name; the nested ones share them."""
        return group_of(self.name)

    @property
    def a_key(self) -> str:
        """Key of A in the file."""
        return factor_key(self.name, "A", is_embedding=self.is_embedding)

    @property
    def b_key(self) -> str:
        """Key of B in the file."""
        return factor_key(self.name, "B", is_embedding=self.is_embedding)

    @property
    def rank(self) -> int:
        """Rank of the update, of each expert."""
        return self.a.shape[0] // self.num_experts

    @property
    def cost(self) -> int:
        """Parameters of one rank-one component, over all experts."""
        return (self.a.numel() + self.b.numel()) // max(self.rank, 1)

    @property
    def min_rank(self) -> int:
        """1 where the module must stay adapted, else 0.

        ``exclude_modules`` does not reach bare parameters.
        """
        return int(self.has_bias or bool(self.parameters))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """B (experts, out, r) and A (experts, r, in · kernel): ΔW of expert e is s · B[e] A[e]."""
        return stack(self.b, self.a, self.num_experts)

    def shapes(self, rank: int) -> Shapes:
        """Shapes of A and B in the file at another rank."""
        size = rank * self.num_experts
        return (size, *self.a.shape[1:]), (self.b.shape[0], size, *self.b.shape[2:])

    def contributing(self) -> Tensor:
        """Which components are not exactly 0, (rank,)."""
        b, a = self.stacked()
        return (b.ne(0).any(1) & a.ne(0).any(2)).any(0)

    def taken(self, keep: Tensor) -> "Update":
        """The update of the components ``keep`` alone, (kept,) indices."""
        experts = torch.arange(self.num_experts)
        rows = (experts[:, None] * self.rank + keep).flatten()
        columns = (keep[:, None] * self.num_experts + experts).flatten()
        return dataclasses.replace(
            self, a=self.a.index_select(0, rows), b=self.b.index_select(1, columns)
        )

    def padded(self, rank: int) -> "Update":
        """The same update with zero components up to ``rank``."""
        if rank == self.rank:
            return self
        a_shape, b_shape = self.shapes(rank)
        a, b = self.a.new_zeros(a_shape), self.b.new_zeros(b_shape)
        by_expert = a.view(self.num_experts, rank, *a.shape[1:])
        by_expert[:, : self.rank] = self.a.view(self.num_experts, self.rank, *a.shape[1:])
        b[:, : self.b.shape[1]] = self.b
        return dataclasses.replace(self, a=a, b=b)

    def unscaled(self) -> "Update":
        """The same update with scaling 1: the scaling goes into B, in fp32 at least."""
        if self.scaling == 1:
            return self
        exact = torch.promote_types(self.b.dtype, torch.float32)
        b = (self.b.to(exact) * self.scaling).to(self.b.dtype)
        return dataclasses.replace(self, b=b, scaling=1.0)


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        folder: where it lies.
        stored: the fields of its config; for a gated adapter those that LoRA has, with its rank.
        updates: one for each adapted module, in the order of their names; gates are folded into B.
        others: trained heads, biases, token embeddings and the like, by key.
        pruned: modules of which nothing is left but that they were pruned, in order.
        is_gated: whether it is a checkpoint with gates.
    """

    folder: Path
    stored: dict[str, Any]
    updates: tuple[Update, ...]
    others: dict[str, Tensor] = field(default_factory=dict)
    pruned: tuple[str, ...] = ()
    is_gated: bool = False


def stack(b: Tensor, a: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Factors as stored, as matrices by expert: B (experts, out, r) and A (experts, r, in).

    PEFT keeps fused experts' A as rows e · r + j and B as columns j · experts + e.
    """
    rows = a.reshape(num_experts, a.shape[0] // num_experts, -1)
    columns = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return columns, rows


def read(folder: Path, *, allowed: Collection[str] = ()) -> Adapter:
    """Read the folder of a plain LoRA, or of a gated checkpoint, whose gates are folded into B.

    Args:
        folder: of the adapter.
        allowed: fields among ``VARIANTS`` that the caller can cope with.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        AdapterFileError: it is another method, a variant of LoRA, damaged, or holds tensors that are
            not understood.
    """
    fields = read_config(checked_source(folder))
    _check_method(fields, folder, allowed)
    parts, others = _sorted(_tensors(folder / WEIGHTS_FILE), fields, folder)
    biased = {group_of(m["module"]) for key in others if (m := _BIAS_OWNER.fullmatch(key))}
    nested: dict[str, int] = {}
    for name in parts:
        nested[group_of(name)] = nested.get(group_of(name), 0) + 1
    updates = []
    for name, part in sorted(parts.items()):
        if not _is_dropped(part):
            parameters = _parameters(name, fields, nested[group_of(name)], folder)
            update = _update(name, part, fields, parameters, folder)
            updates.append(dataclasses.replace(update, has_bias=update.group in biased))
    if not updates:
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B: the adapter equals its base model."
        )
    present = [u.name for u in updates]
    is_gated = fields.get("peft_type") == "DYNLORA"
    return Adapter(
        folder=folder,
        stored=_lora_fields(fields) if is_gated else fields,
        updates=tuple(_with_equal_halves(updates)),
        others=others,
        pruned=tuple(sorted({*pruned_modules(folder, fields, present), *_gone(parts, present)})),
        is_gated=is_gated,
    )


def _check_method(fields: Mapping[str, Any], folder: Path, allowed: Collection[str]) -> None:
    method = fields.get("peft_type")
    if method not in {"LORA", "DYNLORA"}:
        raise AdapterFileError(
            f"{folder} holds an adapter of method {method}; only LoRA and DynLora adapters are sums of "
            "rank-one components."
        )
    used = [name for name in VARIANTS if name not in allowed and fields.get(name)]
    if used:
        raise AdapterFileError(
            f"{folder} was trained with {', '.join(used)}, which changes what its factors mean; merge it "
            "into its base model instead: dynlora export --to merged, or PEFT's merge_and_unload."
        )


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise AdapterFileError(damaged(file, error)) from error


def _sorted(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each module's adapter by module name, and all other tensors by key."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    is_gated = fields.get("peft_type") == "DYNLORA"
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None or not (is_gated or parsed.part in {"A", "B"}):
            _check_other(key, fields, folder)
            others[key if key.startswith(PREFIX) else PREFIX + key] = tensor
            continue
        module = parts.setdefault(parsed.module, {})
        module[parsed.part] = tensor
        if parsed.is_embedding:
            module["is_embedding"] = tensor
    return parts, others


def _check_other(key: str, fields: Mapping[str, Any], folder: Path) -> None:
    """A tensor beside the components must be a whole weight, a bias, or of a module that is saved whole."""
    saved = {*(fields.get("modules_to_save") or ()), "token_adapter"}
    is_known = key.endswith((".weight", "bias")) or bool(saved & set(key.split(".")))
    if is_unknown_part(key) or not is_known:
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} holds {key!r}, which is neither a factor of a plain LoRA nor a "
            "weight that modules_to_save names. Merge the adapter into its base model instead: dynlora "
            "export --to merged."
        )


def _is_dropped(part: Mapping[str, Tensor]) -> bool:
    """Whether these are the parts of a gated module that fell to rank 0 at the freeze."""
    return not {"A", "B"} & part.keys() and "ema" in part and part["ema"].numel() == 0


def _parameters(name: str, fields: Mapping[str, Any], depth: int, folder: Path) -> tuple[str, ...]:
    found = parameters_of(fields, group_of(name))
    if found and len(found) != depth:
        raise AdapterFileError(
            f"{folder}: module {group_of(name)!r} holds the adapters of {depth} parameters, but "
            f"target_parameters names {list(found)} there; config and weights are of two adapters."
        )
    return found


def _update(
    name: str,
    part: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    parameters: tuple[str, ...],
    folder: Path,
) -> Update:
    if not {"A", "B"} <= part.keys():
        missing = next(p for p in ("A", "B") if p not in part)
        raise AdapterFileError(
            f"{folder}: module {name!r} has no lora_{missing}; the file is incomplete."
        )
    a, b = part["A"], part["B"]
    for letter, tensor in (("A", a), ("B", b)):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{folder}: {letter} of module {name!r} has dtype {tensor.dtype} or holds NaN or infinity; "
                "the run that wrote it had failed. Use an earlier checkpoint."
            )
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
        raise AdapterFileError(
            f"{folder}: module {name!r} has A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}: a "
            "grouped convolution, whose components cannot be told apart, or a damaged file."
        )
    if "c" in part:
        exact = torch.promote_types(b.dtype, torch.float32)
        gates = part["c"].to(exact).view(1, -1, *[1] * (b.ndim - 2))
        b = (b.to(exact) * gates).to(b.dtype)
    experts = _num_experts(name, a.shape[0], fields, bool(parameters), "c" in part, folder)
    return Update(name, a, b, scaling_of(fields, name), "is_embedding" in part, experts, parameters)


def _num_experts(
    name: str,
    size: int,
    fields: Mapping[str, Any],
    has_parameters: bool,
    is_gated: bool,
    folder: Path,
) -> int:
    """How many experts share the factors; by the config, whose rank must fit the tensors."""
    if is_gated:
        return 1  # its two halves of an attention may differ, and the config names the larger
    ranks = ranks_in_config(fields, name)
    rank = next(iter(ranks))
    fits = len(ranks) == 1 and isinstance(rank, int) and rank > 0 and size % rank == 0
    if not fits or (size != rank and not has_parameters):
        raise AdapterFileError(
            f"{folder}: module {name!r} has rank {size}, but {CONFIG_FILE} says {sorted(ranks)[0]} (r and "
            "rank_pattern). PEFT cannot load it either; restore the config that was saved with it."
        )
    return size // rank


def _with_equal_halves(updates: Iterable[Update]) -> Iterable[Update]:
    """Both layers of a MultiheadAttention with one rank, as stock PEFT has it; gated ones may differ."""
    updates = list(updates)
    ranks: dict[str, int] = {}
    for update in updates:
        ranks[update.group] = max(update.rank, ranks.get(update.group, 0))
    return [u.padded(ranks[u.group]) for u in updates]


def _gone(parts: Iterable[str], present: Iterable[str]) -> set[str]:
    """Gated modules whose factors are gone; a half of an attention is not one by itself."""
    there = {group_of(name) for name in present}
    return {group_of(name) for name in parts} - there


_LORA_FIELDS = {name for name, f in LoraConfig.__dataclass_fields__.items() if f.init}


def _lora_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k in _LORA_FIELDS} | {"peft_type": "LORA"}


def refuse_rewriting_start(adapter: Adapter) -> None:
    """Refuse an adapter whose base PEFT changes at each load, by the ranks in its config.

    Raises:
        AdapterFileError: it was started so.
    """
    start = adapter.stored.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(REWRITING_STARTS):
        raise AdapterFileError(
            f"{adapter.folder} has init_lora_weights={start!r}: PEFT changes the base's weights at each "
            "load, for exactly these ranks. Save it with save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...) first, which makes it a plain LoRA, or merge "
            "it: dynlora export --to merged."
        )


def without_zeros(adapter: Adapter) -> Adapter:
    """The adapter without components that are exactly 0; modules without any other become pruned.

    Raises:
        AdapterFileError: every component is 0.
    """
    live: dict[str, Tensor] = {}
    for update in adapter.updates:
        found = update.contributing()
        live[update.group] = live[update.group] | found if update.group in live else found
    if not any(bool(mask.any()) for mask in live.values()):
        raise AdapterFileError(
            f"{adapter.folder}: every component is 0, so the adapter equals its base model."
        )
    kept, gone = [], list(adapter.pruned)
    for update in adapter.updates:
        places = live[update.group].nonzero().flatten()
        if len(places) == 0 and update.min_rank:
            places = places.new_zeros(1)
        if len(places):
            kept.append(update.taken(places))
        elif not update.name.endswith(OUT_PROJECTION):
            gone.append(update.group)
    return dataclasses.replace(adapter, updates=tuple(kept), pruned=tuple(sorted(set(gone))))
