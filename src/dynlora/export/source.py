"""An adapter folder read back without its base model: native, finished, or any plain LoRA."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynlora.gated.config import DYNLORA, DynLoraConfig, plain_lora_fields
from dynlora.gated.fold import fold_factors, pad_halves
from dynlora.gated.layer import OUT_PROJECTION

PREFIX = "base_model.model."
"""What PEFT puts before every name in an adapter file."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_FACTOR = re.compile(
    r"(?P<name>.+)\.(?P<part>lora_A\.weight|lora_A\.c|lora_B\.weight|lora_c|lora_ema|lora_live"
    r"|lora_embedding_A|lora_embedding_B)"
)
_PARTS = {"lora_embedding_A": "a", "lora_A.weight": "a", "lora_embedding_B": "b", "lora_B.weight": "b",
          "lora_A.c": "c", "lora_c": "c", "lora_live": "live", "lora_ema": "ema"}  # fmt: skip
_REFUSED = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config",
            "arrow_config", "alora_invocation_tokens", "lora_bias", "target_parameters",
            "layer_replication")  # fmt: skip


@dataclass(frozen=True)
class PlainAdapter:
    """A LoRA with scaling 1 in every module, apart from any model.

    Attributes:
        fields: of the LoraConfig that trained it; ranks, alphas and patterns in it are void.
        factors: A (rank, in, ...) and B (out, rank, ...) by module name, rank 1 or more.
        dead: names of the adapted modules whose rank is 0, as far as the folder tells.
        embeddings: names of the modules that are embeddings: A (rank, vocabulary), B (dim, rank).
        others: heads and the like, by their key in the adapter file.
        shapes: A's and B's shapes without the rank, by name, of dead modules where the folder tells.
    """

    fields: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]
    dead: tuple[str, ...] = ()
    embeddings: frozenset[str] = frozenset()
    others: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name, dead ones included."""
        alive = {name: a.shape[0] for name, (a, _) in self.factors.items()}
        return {name: alive.get(name, 0) for name in sorted({*alive, *self.dead})}


def recorded_labels(path: str | os.PathLike[str]) -> list[str]:
    """Class names that the run which left this adapter wrote beside it (``run.json``); [] for none.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(path) / "run.json"
    if not file.is_file():
        return []
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is damaged ({error}), so class names cannot be read; remove it to go without."
        ) from error
    labels = record.get("data", {}).get("labels") if isinstance(record, dict) else None
    return [str(label) for label in labels] if isinstance(labels, list) else []


def read_adapter(path: str | os.PathLike[str]) -> PlainAdapter:
    """Read an adapter folder and fold gates and scaling into B.

    Args:
        path: folder of a native checkpoint, a finished adapter, or any LoRA that PEFT wrote.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: its method is no LoRA, or a LoRA variant whose update is more than B A.
    """
    folder = _checked_folder(Path(path))
    config = _config(folder)
    used = [name for name in _REFUSED if getattr(config, name, None)]
    if used:
        raise ValueError(
            f"{folder} was trained with {', '.join(used)}, which changes what its factors mean; merge it "
            "with PEFT's merge_and_unload instead."
        )
    parts, others = _split(_tensors(folder / WEIGHTS_FILE))
    return _folded(config, parts, others, folder)


def _checked_folder(folder: Path) -> Path:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if not missing:
        return folder
    steps = [(int(p.name[11:]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    hint = f"did you mean {max(steps)[1]}" if steps else "name the folder of an adapter"
    if (folder / "adapter_model.bin").is_file():
        hint = "adapter_model.bin is a pickle, which may run code; load and save it again with PEFT"
    raise FileNotFoundError(f"{folder} holds no {missing[0]}: {hint}.")


def _config(folder: Path) -> LoraConfig:
    stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    method = stored.get("peft_type") if isinstance(stored, dict) else None
    if method not in {PeftType.LORA.value, DYNLORA.value}:
        raise ValueError(
            f"{folder} holds an adapter of method {method}; only LoRA and DynLora adapters are sums of "
            "rank-one components that can be exported."
        )
    return PeftConfig.from_pretrained(str(folder))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error


def _split(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each module's adapter by module name, and all other tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            others[key if key.startswith(PREFIX) else PREFIX + key] = tensor
            continue
        module = parts.setdefault(match["name"], {})
        module[_PARTS[match["part"]]] = tensor
        if match["part"].startswith("lora_embedding"):
            module["embedding"] = tensor
    return parts, others


def _folded(
    config: LoraConfig,
    parts: dict[str, dict[str, Tensor]],
    others: dict[str, Tensor],
    folder: Path,
) -> PlainAdapter:
    factors, shapes = {}, {}
    for name, part in parts.items():
        if "a" not in part or "b" not in part:
            if "ema" not in part or part["ema"].numel():
                raise ValueError(f"{folder}: module {name!r} has only a part of its factors.")
            continue  # fell to rank 0 at the freeze, and its factors are gone
        a, b = part["a"], part["b"]
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{folder}: module {name!r} has factors of rank {a.shape[0]} and {b.shape[1]}; the file "
                "is damaged."
            )
        gate = part.get("c", torch.ones(a.shape[0]))
        factors[name] = fold_factors(a, b, gate, scaling=scaling_of(config, name))
        shapes[name] = (tuple(a.shape[1:]), (b.shape[0], *b.shape[2:]))
    pad_halves(factors)
    alive = {name: pair for name, pair in factors.items() if pair[0].shape[0]}
    if not alive:
        raise ValueError(f"{folder}: every component is 0, so the adapter equals its base model.")
    gone = (*parts, *_excluded_like(config, parts))
    return PlainAdapter(
        fields=_fields(config),
        factors=dict(sorted(alive.items())),
        dead=tuple(sorted({n for n in gone if n not in alive})),
        embeddings=frozenset(n for n, p in parts.items() if "embedding" in p),
        others=others,
        shapes={n: s for n, s in shapes.items() if n not in alive},
    )


def scaling_of(config: LoraConfig, name: str) -> float:
    """PEFT's scaling of one module: alpha / r, or alpha / sqrt(r), with its patterns."""
    outer = name.removesuffix(OUT_PROJECTION)
    rank = _by_pattern(config.rank_pattern, outer, config.r)
    alpha = _by_pattern(config.alpha_pattern, outer, config.lora_alpha)
    return float(alpha / rank**0.5 if config.use_rslora else alpha / rank)


def _by_pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _fields(config: LoraConfig) -> dict[str, Any]:
    if isinstance(config, DynLoraConfig):
        return plain_lora_fields(config)
    return {k: v for k, v in vars(config).items() if k in _LORA_FIELDS}


_LORA_FIELDS = {
    name for name, f in LoraConfig.__dataclass_fields__.items() if f.init and name != "peft_type"
}


def _excluded_like(config: LoraConfig, known: Iterable[str]) -> list[str]:
    """Excluded modules that are named in full like the adapted ones: those of rank 0."""
    if not config.exclude_modules or isinstance(config.exclude_modules, str):
        return []
    shapes = {re.sub(r"\d+", "#", name) for name in known}
    return [n for n in config.exclude_modules if re.sub(r"\d+", "#", n) in shapes]
