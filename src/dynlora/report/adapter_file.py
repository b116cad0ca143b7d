"""What an adapter folder says of itself, from its config and its weights' header: no torch, no model."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

Header = Mapping[str, tuple[tuple[int, ...], str]]

_PART = re.compile(
    r"(?:base_model\.model\.)?(?P<name>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A"
    r"|lora_embedding_B|lora_A\.c|lora_c|lora_ema|lora_live)"
)

ENERGY = 0.99
"""Share of ‖ΔW‖² that a module's effective rank must hold."""


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter folder in figures.

    Attributes:
        folder: where it is.
        kind: "native" (dynlora, gates included), "plain LoRA" or another method's name.
        base_model: what it was trained on, as its config says.
        task_type: PEFT's, or None.
        ranks: stored rank by module name, zeros included.
        init_r, target_r: of a native adapter, else None.
        num_parameters: of the factors A and B.
        num_bytes: of the weights file.
        dtypes: of the factors.
        scales: smallest and largest scaling alpha / r of the modules.
        heads: tensors that belong to no LoRA: classifiers, trained biases.
        served_by: what reads the folder as it is.
        note: why others do not, and the way out; empty if nothing is to be said.
        effective_ranks: by module name, components for 99 % of the squared norm; {} if not asked for.
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
    effective_ranks: dict[str, int] = field(default_factory=dict)

    @property
    def saving(self) -> float | None:
        """Share of components that a dynamic budget could do without; None if not measured."""
        total = sum(self.ranks.values())
        return 1 - sum(self.effective_ranks.values()) / total if self.effective_ranks else None


def inspect_adapter(path: str | os.PathLike[str], *, effective: bool = False) -> AdapterFacts:
    """Read what the folder says; the weights themselves only for effective ranks.

    Args:
        path: folder of an adapter.
        effective: whether to compute effective ranks from singular values.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: config or weights are damaged.
    """
    folder = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: name the folder of an adapter.")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} is not a JSON object.")
    header = read_header(folder / WEIGHTS_FILE)
    modules, heads = _modules(header)
    stored = {n: _rank(parts, header) for n, parts in modules.items()}
    ranks = stored | dict.fromkeys(_dead(config, stored), 0)
    factors = [parts[p] for parts in modules.values() for p in ("a", "b") if p in parts]
    scales = [_scaling(config, name) for name, rank in stored.items() if rank] or [0.0]
    kind = {"DYNLORA": "native", "LORA": "plain LoRA"}.get(
        str(config.get("peft_type")), str(config.get("peft_type"))
    )
    served_by, note = servers(kind, ranks, scales, config, heads=heads)
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
        effective_ranks=_effective_ranks(folder / WEIGHTS_FILE, modules) if effective else {},
    )


def servers(
    kind: str,
    ranks: Mapping[str, int],
    scales: list[float],
    config: Mapping[str, Any],
    *,
    heads: int,
) -> tuple[list[str], str]:
    """What reads an adapter as it is, and what the others need."""
    if kind == "native":
        return [
            "PEFT with dynlora"
        ], "dynlora export --to ragged, uniform or merged serves it anywhere"
    if kind != "plain LoRA":
        return ["PEFT"], "only LoRA adapters can be exported"
    if heads:
        return ["PEFT", "transformers"], (
            "vLLM and llama.cpp refuse what was trained beside the LoRA, such as a head; "
            "dynlora export --to merged puts it into the model"
        )
    everywhere = ["PEFT", "transformers", "vLLM"]
    one_scale = max(scales) - min(scales) < 1e-9
    alive = {rank for rank in ranks.values() if rank}
    if len(alive) == 1 and one_scale and 0 not in ranks.values():
        rank = next(iter(alive))
        more = ["llama.cpp", "SGLang", *(["TGI", "LoRAX"] if rank % 8 == 0 else [])]
        return [*everywhere, *more], "" if rank % 8 == 0 else "TGI and LoRAX want a multiple of 8"
    note = "llama.cpp, SGLang, TGI, LoRAX and MLX want one rank: dynlora export --to uniform"
    if one_scale and scales[0] == 1 and config.get("lora_alpha") == config.get("r"):
        everywhere.append("diffusers")
    return everywhere, note


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by tensor name of a safetensors file.

    Raises:
        ValueError: the file is no whole safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # no mapping
            return {k: (tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _modules(header: Header) -> tuple[dict[str, dict[str, str]], int]:
    """Keys of a, b, c, ema and live by module name, and how many tensors belong to none."""
    short = {"lora_A.weight": "a", "lora_embedding_A": "a", "lora_B.weight": "b",
             "lora_embedding_B": "b", "lora_A.c": "c", "lora_c": "c", "lora_ema": "ema",
             "lora_live": "live"}  # fmt: skip
    modules: dict[str, dict[str, str]] = {}
    others = 0
    for key in header:
        match = _PART.fullmatch(key)
        if match:
            modules.setdefault(match["name"], {})[short[match["part"]]] = key
        else:
            others += 1
    return modules, others


def _rank(parts: Mapping[str, str], header: Header) -> int:
    key = parts.get("a") or parts.get("ema")
    shape = header[key][0] if key else ()
    return shape[0] if shape else 0


def _dead(config: Mapping[str, Any], stored: Mapping[str, int]) -> list[str]:
    """Modules that the config excludes by a full name like those of the others: rank 0."""
    excluded = config.get("exclude_modules")
    shapes = {re.sub(r"\d+", "#", name) for name in stored}
    names = excluded if isinstance(excluded, list) else []
    return [n for n in names if n not in stored and re.sub(r"\d+", "#", n) in shapes]


def _scaling(config: Mapping[str, Any], name: str) -> float:
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("init_r") or config.get("r", 1))
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_pattern(pattern: Any, name: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):  # PEFT's rule: the first that fits
            return value
    return default


def _effective_ranks(file: Path, modules: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    stored = dict(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]  # in Rust
    ranks = {}
    for name, parts in modules.items():
        if "a" not in parts or "b" not in parts:
            ranks[name] = 0
            continue
        a, b = _array(stored[parts["a"]]), _array(stored[parts["b"]])
        if "c" in parts:
            a = a * _array(stored[parts["c"]]).reshape(-1, *[1] * (a.ndim - 1))
        ranks[name] = effective_rank(
            a.reshape(a.shape[0], math.prod(a.shape[1:])),
            b.reshape(b.shape[0], math.prod(b.shape[1:])),
        )
    return ranks


def _array(stored: Mapping[str, Any]) -> NDArray[np.float64]:
    if stored["dtype"] == "BF16":  # the upper half of a float32
        values = (np.frombuffer(stored["data"], "<u2").astype("<u4") << 16).view("<f4")
    elif stored["dtype"] in _NUMPY:
        values = np.frombuffer(stored["data"], _NUMPY[stored["dtype"]])
    else:
        raise ValueError(f"factors of dtype {stored['dtype']} have no effective rank here.")
    return values.astype(np.float64).reshape(stored["shape"])


def effective_rank(a: NDArray[np.float64], b: NDArray[np.float64]) -> int:
    """Singular values of B A that hold 99 % of its squared Frobenius norm.

    Args:
        a: (rank, in).
        b: (out, rank).

    >>> effective_rank(np.eye(3), np.diag([1.0, 1.0, 0.01]))
    2
    """
    if min(a.shape[0], b.shape[1]) == 0:
        return 0
    core = np.linalg.qr(b).R @ np.linalg.qr(a.T).R.T
    energy = np.cumsum(np.linalg.svd(core, compute_uv=False) ** 2)
    if energy[-1] == 0:
        return 0
    return int(np.searchsorted(energy, ENERGY * energy[-1]) + 1)
