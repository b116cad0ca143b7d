"""Read a finished LoRA folder for shrinking: its updates by module, and everything else untouched."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<name>.+)\.lora_"
    r"(?:(?P<plain>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
_BIAS = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.(?:lora_B|base_layer)\.bias")

_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config",
    "arrow_config", "alora_invocation_tokens", "ensure_weight_tying",
)  # fmt: skip
"""Fields of LoraConfig with which an update is more than scaling · B A, or shared between modules."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` by which PEFT also changes the base's weights at each load."""


@dataclass(frozen=True)
class Update:
    """The low-rank update of one module: ΔW = scaling · B A, for each expert if there are several.

    Attributes:
        name: module name in the base model, with ``.base_layer`` where PEFT nests its layers.
        group: module whose rank and alpha a config can name; the nested ones share them.
        a_key: key of A in the file.
        b_key: key of B in the file.
        a: A as stored: (r, in), (r, in, kernel ...) or, for fused experts, (r · experts, in).
        b: B as stored: (out, r), (out, r, 1 ...) or (out, r · experts).
        num_experts: experts that one pair of factors holds; 1 for every other layer.
        scaling: what PEFT multiplies B A by.
        parameters: names of the bare parameters that are adapted (``target_parameters``), or none.
        min_rank: 1 where the module must stay adapted: it has a bias of its own, or it holds bare
            parameters, which ``exclude_modules`` does not reach.
    """

    name: str
    group: str
    a_key: str
    b_key: str
    a: Tensor
    b: Tensor
    num_experts: int
    scaling: float
    parameters: tuple[str, ...] = ()
    min_rank: int = 0

    @property
    def rank(self) -> int:
        """Rank of the update, of each expert."""
        return self.a.shape[0] // self.num_experts

    @property
    def cost(self) -> int:
        """Parameters of one rank-one component, over all experts."""
        return (self.a.numel() + self.b.numel()) // self.rank

    def stacked(self) -> tuple[Tensor, Tensor]:
        """B (experts, out, r) and A (experts, r, in · kernel): ΔW of expert e is s · B[e] A[e]."""
        return stack(self.b, self.a, self.num_experts)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B in the file at another rank."""
        size = rank * self.num_experts
        return (size, *self.a.shape[1:]), (self.b.shape[0], size, *self.b.shape[2:])


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        folder: where it lies.
        stored: its ``adapter_config.json``.
        updates: one for each adapted module, in the order of their names.
        others: trained heads, biases, token embeddings and the like, by key; copied untouched.
    """

    folder: Path
    stored: dict[str, Any]
    updates: tuple[Update, ...]
    others: dict[str, Tensor] = field(default_factory=dict)


def stack(b: Tensor, a: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Factors as stored, as matrices by expert: B (experts, out, r) and A (experts, r, in).

    PEFT keeps fused experts' A as rows e · r + j and B as columns j · experts + e.
    """
    rows = a.reshape(num_experts, a.shape[0] // num_experts, -1)
    columns = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)
    return columns, rows


def read(folder: Path) -> Adapter:
    """Read a folder that PEFT wrote for a plain LoRA.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it is not a plain LoRA, is damaged, or holds tensors that are not understood.
    """
    stored = _stored_config(folder)
    factors, others = _sorted_tensors(folder)
    biased = {m["name"] for key in others if (m := _BIAS.fullmatch(key))}
    for key in others:
        _check_other(key, stored, folder)
    nested: dict[str, int] = {}
    for name in factors:
        nested[_group(name)] = nested.get(_group(name), 0) + 1
    updates = [
        _update(name, pair, stored, folder, depth=nested[_group(name)], biased=name in biased)
        for name, pair in sorted(factors.items())
    ]
    if not updates:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B: nothing to shrink.")
    return Adapter(folder, stored, tuple(updates), others)


def _stored_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            hint = "name the folder of a finished LoRA"
            if name == WEIGHTS_FILE and (folder / "adapter_model.bin").is_file():
                hint = "adapter_model.bin is a pickle; load the adapter with PEFT and save it again"
            raise FileNotFoundError(f"{folder} holds no {name}: {hint}.")
    try:
        stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}.") from error
    method = stored.get("peft_type") if isinstance(stored, dict) else None
    if method == "DYNLORA":
        raise ValueError(
            f"{folder} is a checkpoint with gates (peft_type DYNLORA). Make it a plain LoRA first: "
            f"dynlora export {folder}"
        )
    if method != "LORA":
        raise ValueError(f"{folder} has peft_type {method!r}; only LORA can be shrunk.")
    used = [name for name in _VARIANTS if stored.get(name)]
    if used:
        raise ValueError(
            f"{folder} was trained with {', '.join(used)}, so its update is not plain scaling · B A and "
            "cannot be cut by singular values. Merge it with PEFT's merge_and_unload, or train plain LoRA."
        )
    start = stored.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{folder} has init_lora_weights={start!r}: PEFT changes the base's weights at each load, for "
            "exactly these ranks. Save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) first, which makes it a "
            "plain LoRA (docs of PEFT, LoRA initialization)."
        )
    return stored


def _sorted_tensors(
    folder: Path,
) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], dict[str, Tensor]]:
    """Key and tensor of A and B by module name, and all other tensors by key."""
    factors: dict[str, dict[str, tuple[str, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not a whole safetensors file: {error}."
        ) from error
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            part = match["plain"] or match["embedding"]
            factors.setdefault(match["name"], {})[part] = (key, tensor)
    return factors, others


def _check_other(key: str, stored: Mapping[str, Any], folder: Path) -> None:
    """A tensor beside the factors must be a whole weight, a bias, or of a module that was saved whole."""
    if "lora_" in key and not key.endswith(".lora_B.bias"):
        known = False
    else:
        saved = {*(stored.get("modules_to_save") or ()), "token_adapter"}
        known = key.endswith((".weight", ".bias")) or bool(saved & set(key.split(".")))
    if not known:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} holds {key!r}, which is neither a factor of a plain LoRA nor a "
            "weight that modules_to_save names. Merge the adapter with PEFT's merge_and_unload instead."
        )


def _group(name: str) -> str:
    return name.split(".base_layer", maxsplit=1)[0]


def _update(
    name: str,
    pair: Mapping[str, tuple[str, Tensor]],
    stored: Mapping[str, Any],
    folder: Path,
    *,
    depth: int,
    biased: bool,
) -> Update:
    if pair.keys() != {"A", "B"}:
        missing = ({"A", "B"} - pair.keys()).pop()
        raise ValueError(
            f"{folder}: module {name!r} has no lora_{missing}; the file is incomplete."
        )
    (a_key, a), (b_key, b) = pair["A"], pair["B"]
    for key, tensor in (a_key, a), (b_key, b):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{folder}: {key} has dtype {tensor.dtype} or holds NaN or infinity; the run that wrote it "
                "had failed. Use an earlier checkpoint."
            )
    group = _group(name)
    parameters = _parameters_of(group, stored, depth, folder)
    rank, scaling = _rank_and_scaling(group, parameters, stored, folder)
    size = a.shape[0]
    if b.ndim < 2 or size != b.shape[1]:
        raise ValueError(
            f"{folder}: module {name!r} has A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}: a "
            "grouped convolution, which cannot be cut, or a damaged file."
        )
    if rank <= 0 or size % rank or (size != rank and not parameters):
        raise ValueError(
            f"{folder}: module {name!r} has rank {size}, but {CONFIG_FILE} says {rank} (r and "
            "rank_pattern). PEFT cannot load it either; restore the config that was saved with it."
        )
    return Update(
        name, group, a_key, b_key, a, b, size // rank, scaling, parameters,
        min_rank=int(biased or bool(parameters)),
    )  # fmt: skip


def _parameters_of(
    group: str, stored: Mapping[str, Any], depth: int, folder: Path
) -> tuple[str, ...]:
    """Which bare parameters of module ``group`` are adapted, by ``target_parameters``."""
    found = set()
    for target in stored.get("target_parameters") or ():
        last = target.rpartition(".")[2]
        if f".{group}.{last}".endswith(f".{target}"):
            found.add(last)
    if found and len(found) != depth:
        raise ValueError(
            f"{folder}: module {group!r} holds the adapters of {depth} parameters, but target_parameters "
            f"names {sorted(found)} there; the config is not the one the file was saved with."
        )
    return tuple(sorted(found))


def _rank_and_scaling(
    group: str, parameters: tuple[str, ...], stored: Mapping[str, Any], folder: Path
) -> tuple[int, float]:
    """Rank and scaling of a module; PEFT looks bare parameters up by module and parameter name."""
    names = [f"{group}.{p}" for p in parameters] or [group]
    ranks = {_by_pattern(stored.get("rank_pattern"), n, stored["r"]) for n in names}
    alphas = {_by_pattern(stored.get("alpha_pattern"), n, stored["lora_alpha"]) for n in names}
    if len(ranks) > 1 or len(alphas) > 1:
        raise ValueError(
            f"{folder}: parameters {list(parameters)} of module {group!r} have ranks {sorted(ranks)} and "
            f"alphas {sorted(alphas)}; the file does not tell which factors belong to which. Give all "
            "parameters of a module one rank and one alpha."
        )
    rank, alpha = ranks.pop(), alphas.pop()
    if not isinstance(rank, int) or rank <= 0:
        raise ValueError(f"{folder}: {CONFIG_FILE} gives module {group!r} rank {rank!r}.")
    return rank, float(alpha / rank**0.5 if stored.get("use_rslora") else alpha / rank)


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)
