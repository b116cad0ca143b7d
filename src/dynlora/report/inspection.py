"""What an adapter folder says of itself, from its config and its weights' header: no torch, no model."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from dynlora.adapter_files.folder import (
    Header,
    checked_source,
    pruned_modules,
    read_config,
    read_header,
)
from dynlora.adapter_files.format import (
    PREFIX,
    REWRITING_STARTS,
    VARIANTS,
    WEIGHTS_FILE,
    group_of,
    is_targeted,
    is_unknown_part,
    parameters_of,
    parse_key,
    ranks_in_config,
    scaling_of,
)
from dynlora.report.layout import group_by_stack

SHARES = (0.99, 0.95, 0.9, 0.8)
"""Of the adapter's energy, Σσ² over all modules, one for each size that is named."""

SHOWN_SHARE = 0.95
"""The share whose ranks by module are kept."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}

Parts = dict[str, dict[str, str]]
"""Keys of A, B, c, ema and live by module name."""


@dataclass(frozen=True)
class Size:
    """What a share of an adapter's energy takes.

    Attributes:
        share: of Σσ², scaling included.
        components: singular triplets that hold it, those of most energy per parameter first.
        num_parameters: of these.
    """

    share: float
    components: int
    num_parameters: int


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter folder in figures.

    Attributes:
        folder: where it is.
        kind: "native" (dynlora, gates included), "plain LoRA" or another method's name.
        base_model: what it was trained on, as its config says.
        task_type: PEFT's, or None.
        ranks: stored rank by module name; zeros for modules that are known to be pruned.
        init_r, target_r: of a native adapter, else None.
        num_parameters: of the factors A and B.
        num_bytes: of the weights file.
        dtypes: of the factors.
        scales: smallest and largest scaling alpha / r of the modules.
        heads: tensors that belong to no LoRA: classifiers, trained biases.
        served_by: what reads the folder as it is; nothing where config and weights do not fit.
        note: why others do not, and the way out; empty if nothing is to be said.
        sizes: what shares of the energy take, largest first; () if not asked for.
        effective_ranks: by module name, for ``SHOWN_SHARE`` of the energy; {} if not asked for.
    """

    folder: str
    kind: str
    base_model: str | None
    task_type: str | None
    ranks: dict[str, int]
    init_r: int | None
    target_r: float | None
    num_parameters: int
    num_bytes: int
    dtypes: list[str]
    scales: tuple[float, float]
    heads: int
    served_by: list[str]
    note: str
    sizes: tuple[Size, ...] = ()
    effective_ranks: dict[str, int] = field(default_factory=dict)


def inspect_adapter(path: str | os.PathLike[str], *, effective: bool = False) -> AdapterFacts:
    """Read what the folder says; the weights themselves only for sizes by energy.

    Args:
        path: folder of an adapter.
        effective: whether to compute, from singular values, what shares of the energy take.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        AdapterFileError: config or weights are damaged.
    """
    folder = checked_source(Path(path))
    config = read_config(folder)
    header = read_header(folder / WEIGHTS_FILE)
    modules, heads = _modules(header)
    stored = {n: _rank(parts, header, config, n) for n, parts in modules.items()}
    pruned = pruned_modules(folder, config, list(modules))
    ranks = stored | dict.fromkeys(pruned, 0)
    factors = [parts[p] for parts in modules.values() for p in ("A", "B") if p in parts]
    kind = _kind(config)
    scales = [scaling_of(config, n) for n, rank in stored.items() if rank] or [0.0]
    problem = _problem(config, header, modules) if kind == "plain LoRA" else ""
    served_by, note = ([], problem) if problem else servers(config, ranks, scales, heads=heads)
    sizes, effective_ranks = (
        _effective(folder / WEIGHTS_FILE, config, modules) if effective else ((), {})
    )
    return AdapterFacts(
        folder=str(folder),
        kind=kind,
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        ranks=dict(sorted(ranks.items())),
        init_r=config.get("init_r"),
        target_r=config.get("target_r"),
        num_parameters=sum(math.prod(header[key][0]) for key in factors),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        dtypes=sorted({header[key][1] for key in factors}),
        scales=(min(scales), max(scales)),
        heads=heads,
        served_by=served_by,
        note=note,
        sizes=sizes,
        effective_ranks=dict.fromkeys(ranks, 0) | effective_ranks if effective else {},
    )


def _kind(config: Mapping[str, Any]) -> str:
    method = str(config.get("peft_type"))
    return {"DYNLORA": "native", "LORA": "plain LoRA"}.get(method, method)


def servers(
    config: Mapping[str, Any], ranks: Mapping[str, int], scales: list[float], *, heads: int
) -> tuple[list[str], str]:
    """What reads an adapter as it is, and what the others need."""
    kind = _kind(config)
    if kind == "native":
        return ["PEFT with dynlora"], "a plain LoRA serves anywhere: dynlora export"
    if kind != "plain LoRA":
        return ["PEFT"], "only LoRA adapters can be exported"
    start = config.get("init_lora_weights")
    if used := [name for name in VARIANTS if config.get(name)]:
        return [
            "PEFT"
        ], f"{', '.join(used)} changes what the factors mean: dynlora export --to merged"
    if isinstance(start, str) and start.startswith(REWRITING_STARTS):
        return [
            "PEFT"
        ], f"{start} changes the base's weights at each load: dynlora export --to merged"
    if heads:
        return ["PEFT", "transformers"], (
            "vLLM and llama.cpp refuse what was trained beside the LoRA, such as a head; "
            "dynlora export --to merged puts it into the model"
        )
    everywhere = ["PEFT", "transformers", "vLLM"]
    one_scale = max(scales) - min(scales) < 1e-9
    alive = {rank for rank in ranks.values() if rank}
    if len(alive) > 1 or not one_scale or 0 in ranks.values():
        if one_scale and scales[0] == 1 and config.get("lora_alpha") == config.get("r"):
            everywhere.append("diffusers")
        return (
            everywhere,
            ("llama.cpp, SGLang, TGI, LoRAX and MLX want one rank: dynlora export --to uniform"),
        )
    return _readers_of_one_rank(everywhere, next(iter(alive)), list(ranks))


def _readers_of_one_rank(
    everywhere: list[str], rank: int, names: list[str]
) -> tuple[list[str], str]:
    """All servers, but those that the modules or the rank do not suit."""
    readers, notes = [*everywhere, "llama.cpp"], []
    queries = {n[:-6] for n in names if n.endswith("q_proj")}
    if {n[:-6] for n in names if n.endswith(("k_proj", "v_proj"))} <= queries:
        readers.append("SGLang")
    else:
        notes.append("SGLang wants q_proj wherever k_proj or v_proj is adapted")
    stacks, _ = group_by_stack(dict.fromkeys(names, rank))
    if any(len(row) < len(stack.layers) for stack in stacks for row in stack.rows.values()):
        notes.append("TGI and LoRAX leave out a kind of module that one layer lacks")
    elif rank % 8:
        notes.append("TGI and LoRAX want a multiple of 8")
    else:
        readers += ["TGI", "LoRAX"]
    return readers, "; ".join(notes)


def _problem(config: Mapping[str, Any], header: Header, modules: Parts) -> str:
    """Why PEFT would load the folder as something else, or not at all; empty if it loads right."""
    if not modules:
        return "holds no lora_A and lora_B: PEFT serves the base model"
    for key in header:
        if not key.startswith(PREFIX) or _WRAPPERS & set(key.split(".")):
            return (
                f"key {key!r} matches no module of PEFT's, which would serve the base model: names begin "
                f"with {PREFIX!r} and hold no wrapper. Save the unwrapped model again"
            )
        if is_unknown_part(key) and not any(config.get(name) for name in VARIANTS):
            return f"key {key!r} is unknown, and PEFT leaves it out"
    for name, parts in modules.items():
        if fault := _fault(config, header, name, parts):
            return f"module {name!r} {fault}"
    return ""


def _fault(config: Mapping[str, Any], header: Header, name: str, parts: Mapping[str, str]) -> str:
    if not {"A", "B"} <= parts.keys():
        return "has only a part of its factors: the file is incomplete"
    group = group_of(name)
    experts = parameters_of(config, group)
    if not experts and not is_targeted(config, group):
        return "does not match target_modules, so PEFT leaves its weights out"
    size, ranks = header[parts["A"]][0][0], ranks_in_config(config, name)
    if len(ranks) > 1 or (not experts and ranks != {size}) or size % (min(ranks) or 1):
        return (
            f"does not match the config: rank {size} in the weights, {min(ranks)} by r and rank_pattern; "
            "PEFT cannot load the folder. Restore the config that was saved with it"
        )
    return ""


def _modules(header: Iterable[str]) -> tuple[Parts, int]:
    """Keys by part and module, and how many tensors belong to none."""
    modules: Parts = {}
    others = 0
    for key in header:
        parsed = parse_key(key)
        if parsed is None:
            others += 1
        else:
            modules.setdefault(parsed.module, {})[parsed.part] = key
    return modules, others


def _rank(parts: Mapping[str, str], header: Header, config: Mapping[str, Any], name: str) -> int:
    key = parts.get("A") or parts.get("ema")
    shape = header[key][0] if key else ()
    return shape[0] // _num_experts(shape[0], config, name) if shape else 0


def _num_experts(size: int, config: Mapping[str, Any], name: str) -> int:
    """Experts that share one pair of factors: rows of A over the config's rank."""
    if not parameters_of(config, group_of(name)):
        return 1
    return max(1, size // max(1, *ranks_in_config(config, name)))


def _effective(
    file: Path, config: Mapping[str, Any], modules: Parts
) -> tuple[tuple[Size, ...], dict[str, int]]:
    """Sizes that hold shares of the energy, and ranks by module for one of them.

    Components with the most energy per parameter come first, over the whole model.
    """
    stored = dict(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]  # in Rust
    names, energies, costs = [], [], []
    for name, parts in modules.items():
        if {"A", "B"} <= parts.keys():
            a, b = _array(stored[parts["A"]]), _array(stored[parts["B"]])
            if "c" in parts:
                a = a * _array(stored[parts["c"]]).reshape(-1, *[1] * (a.ndim - 1))
            experts = _num_experts(a.shape[0], config, name)
            spectrum = energy(a, b, experts) * scaling_of(config, name) ** 2
            names += [name] * len(spectrum)
            energies.append(spectrum)
            costs += [(a.size + b.size) * experts // max(1, a.shape[0])] * len(spectrum)
    values = np.concatenate([*energies, np.zeros(0)])
    cost = np.array(costs, dtype=np.int64)
    order = np.argsort(-values / np.maximum(cost, 1), kind="stable")
    reached = np.cumsum(values[order])
    sizes, ranks = [], dict.fromkeys(modules, 0)
    for share in SHARES:
        count = _reaching(reached, share)
        sizes.append(Size(share, count, int(cost[order[:count]].sum())))
        if share == SHOWN_SHARE:
            for i in order[:count]:
                ranks[names[i]] += 1
    return tuple(sizes), ranks


def _reaching(sums: NDArray[np.float64], share: float) -> int:
    """How many summands reach a share of the last of their sums; 0 of nothing."""
    if len(sums) == 0 or sums[-1] == 0:
        return 0
    return int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12)) + 1)


def _array(stored: Mapping[str, Any]) -> NDArray[np.float64]:
    if stored["dtype"] == "BF16":  # the upper half of a float32
        values = (np.frombuffer(stored["data"], "<u2").astype("<u4") << 16).view("<f4")
    elif stored["dtype"] in _NUMPY:
        values = np.frombuffer(stored["data"], _NUMPY[stored["dtype"]])
    else:
        raise ValueError(f"factors of dtype {stored['dtype']} have no singular values here.")
    return values.astype(np.float64).reshape(stored["shape"])


def energy(
    a: NDArray[np.float64], b: NDArray[np.float64], num_experts: int = 1
) -> NDArray[np.float64]:
    """Squared singular values of B A, largest first; summed over experts.

    Args:
        a: (rank · experts, in, ...), expert by expert.
        b: (out, rank · experts, ...), slot by slot.
        num_experts: experts that share the factors.

    >>> energy(np.eye(3), np.diag([1.0, 2.0, 0.0])).tolist()
    [4.0, 1.0, 0.0]
    """
    if a.shape[0] == 0:
        return np.zeros(0)
    rows = a.reshape(num_experts, a.shape[0] // num_experts, -1)
    columns = b.reshape(b.shape[0], -1, num_experts)
    total: NDArray[np.float64] = sum(
        np.linalg.svd(
            np.linalg.qr(columns[..., e]).R @ np.linalg.qr(rows[e].T).R.T, compute_uv=False
        )
        ** 2
        for e in range(num_experts)
    )  # type: ignore[assignment]  # of at least one expert
    return total
