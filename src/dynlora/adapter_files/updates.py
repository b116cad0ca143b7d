"""An adapter without its base model: the updates of its modules, and what lies beside them."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from dynlora.adapter_files.folder import (
    checked_source,
    damaged,
    fault,
    pruned_modules,
    read_config,
)
from dynlora.adapter_files.format import (
    OLD_SCORES,
    OUT_PROJECTION,
    PREFIX,
    VARIANTS,
    WEIGHTS_FILE,
    by_module,
    factor_key,
    group_of,
    is_rewriting,
    is_unknown_part,
    num_experts,
    parameters_of,
    scaling_of,
    with_dead_excluded,
)
from dynlora.errors import AdapterFileError

_BIAS_OWNER = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_B|base_layer)\.\w*bias")

_LORA_FIELDS = {name for name, f in LoraConfig.__dataclass_fields__.items() if f.init}


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
    def keys(self) -> tuple[str, str]:
        """Keys of A and B in the file."""
        a, b = (factor_key(self.name, part, is_embedding=self.is_embedding) for part in "AB")
        return a, b

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
        """B (experts, out, r) and A (experts, r, in · kernel): ΔW of expert e is s · B[e] A[e].

        PEFT keeps fused experts' A as rows e · r + j and B as columns j · experts + e.
        """
        rows = self.a.reshape(self.num_experts, self.rank, math.prod(self.a.shape[1:]))
        columns = self.b.reshape(self.b.shape[0], self.rank, self.num_experts).permute(2, 0, 1)
        return columns, rows

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B in the file at another rank."""
        size = rank * self.num_experts
        return (size, *self.a.shape[1:]), (self.b.shape[0], size, *self.b.shape[2:])

    def of_factors(self, b: Tensor, a: Tensor) -> "Update":
        """The update of other factors: B (experts, out, r) and A (experts, r, in · kernel)."""
        a_shape, b_shape = self.shapes(a.shape[1])
        a = a.reshape(a_shape).to(self.a.dtype).contiguous()
        b = b.permute(1, 2, 0).reshape(b_shape).to(self.b.dtype).contiguous()
        return dataclasses.replace(self, a=a, b=b)

    def contributing(self) -> Tensor:
        """Which components are not exactly 0, (rank,)."""
        b, a = self.stacked()
        return (b.ne(0).any(1) & a.ne(0).any(2)).any(0)

    def taken(self, keep: Tensor) -> "Update":
        """The update of the components ``keep`` alone, (kept,) indices."""
        b, a = self.stacked()
        return self.of_factors(b.index_select(2, keep), a.index_select(1, keep))

    def padded(self, rank: int) -> "Update":
        """The same update with zero components up to ``rank``."""
        b, a = self.stacked()
        gap = rank - self.rank
        return self.of_factors(pad(b, (0, gap)), pad(a, (0, 0, 0, gap))) if gap else self


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds.

    Attributes:
        fields: of its config; for a gated adapter those that LoRA has, with its rank.
        updates: one for each adapted module, in the order of their names; gates are folded into B.
        others: trained heads, biases, token embeddings and the like, by key.
        pruned: modules of which nothing is left but that they were pruned, in order.
        is_gated: whether it has gates.
    """

    fields: dict[str, Any]
    updates: tuple[Update, ...]
    others: dict[str, Tensor]
    pruned: tuple[str, ...] = ()
    is_gated: bool = False

    def unscaled(self) -> "Adapter":
        """The same adapter with scaling 1: the scaling goes into B, in fp32 at least, and into its bias."""
        updates, biases = [], {}
        for update in self.updates:
            exact = torch.promote_types(update.b.dtype, torch.float32)
            b = (update.b.to(exact) * update.scaling).to(update.b.dtype)
            updates.append(dataclasses.replace(update, b=b, scaling=1.0))
            bias = f"{PREFIX}{update.name}.lora_B.bias"
            if bias in self.others:
                biases[bias] = self.others[bias] * update.scaling
        return dataclasses.replace(self, updates=tuple(updates), others=self.others | biases)

    def without_zeros(self) -> "Adapter":
        """The adapter without components that are exactly 0; modules without any other become pruned.

        Raises:
            AdapterFileError: every component is 0.
        """
        live: dict[str, Tensor] = {}
        for update in self.updates:
            found = update.contributing()
            live[update.group] = live[update.group] | found if update.group in live else found
        if not any(bool(mask.any()) for mask in live.values()):
            raise AdapterFileError(
                "every component is 0, so the adapter equals its base model. Train it first."
            )
        kept, gone = [], set(self.pruned)
        for update in self.updates:
            places = live[update.group].nonzero().flatten()
            if len(places) == 0 and update.min_rank:
                places = places.new_zeros(1)
            if len(places):
                kept.append(update.taken(places))
            elif not update.name.endswith(OUT_PROJECTION):
                gone.add(update.group)
        return dataclasses.replace(self, updates=tuple(kept), pruned=tuple(sorted(gone)))


def read(folder: Path) -> Adapter:
    """Read the folder of a plain LoRA, or of a gated checkpoint."""
    fields, file = read_config(checked_source(folder)), folder / WEIGHTS_FILE
    is_gated = fields.get("peft_type") == "DYNLORA"
    unread = OLD_SCORES if is_gated else ()
    try:
        with safe_open(file, framework="pt") as opened:
            keys = [key for key in opened.keys() if not key.endswith(unread)]  # noqa: SIM118  # no mapping
            tensors = {key: opened.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise AdapterFileError(damaged(file, error)) from error
    if is_gated:
        fields = with_dead_excluded(fields)
    adapter = parsed(fields, tensors, str(folder))
    pruned = pruned_modules(folder, fields, [update.name for update in adapter.updates])
    return dataclasses.replace(adapter, pruned=pruned)


def parsed(fields: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """An adapter of its config and its tensors; gates are folded into B.

    Args:
        fields: of the config.
        tensors: by their key in an adapter file.
        where: what errors call the adapter.

    Raises:
        AdapterFileError: it is another method, a variant of LoRA or a start that changes the base, holds
            tensors that are not understood, or config and weights do not fit.
    """
    is_gated = fields.get("peft_type") == "DYNLORA"
    _check_method(fields, where)
    modules, others = by_module(tensors)
    if not is_gated:
        others += [key for m in modules.values() for part, key in m.items() if part not in "AB"]
    for key in others:
        _check_other(key, fields, where)
    header = {key: (tuple(tensor.shape), "") for key, tensor in tensors.items()}
    if found := fault(fields, header):
        raise AdapterFileError(f"{where}: {found}")
    biased = {group_of(m["module"]) for key in others if (m := _BIAS_OWNER.fullmatch(key))}
    updates = []
    for name, keys in modules.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        update = _update(name, parts, fields, where)
        updates.append(
            dataclasses.replace(
                update,
                is_embedding="lora_embedding_" in keys["A"],
                has_bias=update.group in biased,
            )
        )
    if not updates:
        raise AdapterFileError(
            f"{where} holds no lora_A and lora_B: the adapter equals its base model."
        )
    lora = {k: v for k, v in fields.items() if k in _LORA_FIELDS} | {"peft_type": "LORA"}
    return Adapter(
        fields=lora if is_gated else fields,
        updates=tuple(updates),
        others={PREFIX + key.removeprefix(PREFIX): tensors[key] for key in others},
        is_gated=is_gated,
    )


def _check_method(fields: Mapping[str, Any], where: str) -> None:
    method, start = fields.get("peft_type"), fields.get("init_lora_weights")
    if method not in {"LORA", "DYNLORA"}:
        raise AdapterFileError(
            f"{where} holds an adapter of method {method}; only LoRA and DynLora adapters are sums of "
            "rank-one components."
        )
    if used := [name for name in VARIANTS if fields.get(name)]:
        raise AdapterFileError(
            f"{where} was trained with {', '.join(used)}, which changes what its factors mean; merge it "
            "into its base model instead: dynlora export --to merged, or PEFT's merge_and_unload."
        )
    if is_rewriting(start):
        raise AdapterFileError(
            f"{where} has init_lora_weights={start!r}: PEFT changes the base's weights at each load, for "
            "exactly these ranks. Save it with save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...) first, which makes it a plain LoRA, or merge "
            "it: dynlora export --to merged."
        )


def _check_other(key: str, fields: Mapping[str, Any], where: str) -> None:
    """A tensor beside the components must be a whole weight, a bias, or of a module that is saved whole."""
    saved = {*(fields.get("modules_to_save") or ()), "token_adapter"}
    is_known = key.endswith((".weight", "bias")) or bool(saved & set(key.split(".")))
    if is_unknown_part(key) or not is_known:
        raise AdapterFileError(
            f"{where} holds {key!r}, which is neither a factor of a plain LoRA nor a weight that "
            "modules_to_save names. Merge the adapter into its base model instead: dynlora export --to "
            "merged."
        )


def _update(
    name: str, parts: Mapping[str, Tensor], fields: Mapping[str, Any], where: str
) -> Update:
    a, b = parts["A"], parts["B"]
    for letter, tensor in parts.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{where}: {letter} of module {name!r} has dtype {tensor.dtype} or holds NaN or infinity; "
                "the run that wrote it had failed. Use an earlier checkpoint."
            )
    experts = num_experts(fields, name, a.shape[0])
    if "c" in parts:
        exact = torch.promote_types(b.dtype, torch.float32)
        gates = parts["c"].to(exact).view(1, -1, *[1] * (b.ndim - 2))
        b, experts = (b.to(exact) * gates).to(b.dtype), 1
    parameters = parameters_of(fields, group_of(name))
    return Update(name, a, b, scaling_of(fields, name), False, experts, parameters)
