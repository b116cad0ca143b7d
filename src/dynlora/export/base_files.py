"""A base model's folder: where each tensor lies, and which one belongs to an adapted module."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dynlora.export.stream import DTYPES, TensorSpec
from dynlora.gated.layer import OUT_PROJECTION

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseFiles:
    """Weights of a base model on disk.

    Attributes:
        folder: where they are.
        shards: names of the weight files, in order.
        shard_of: file by tensor name.
        config: the content of config.json, {} if there is none.
    """

    folder: Path
    shards: tuple[str, ...]
    shard_of: dict[str, str]
    config: dict[str, Any]

    def specs(self, shard: str) -> dict[str, TensorSpec]:
        """Shape and dtype by name of one file, from its header."""
        with safe_open(self.folder / shard, framework="pt") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return {
                name: TensorSpec(tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }

    def metadata(self, shard: str) -> dict[str, str]:
        """Strings of one file's header."""
        with safe_open(self.folder / shard, framework="pt") as file:
            return dict(file.metadata() or {"format": "pt"})


def open_base(folder: str | Path) -> BaseFiles:
    """Find the weights of a base model.

    Args:
        folder: of the base model, as ``save_pretrained`` writes it.

    Raises:
        FileNotFoundError: there is no such folder, or no safetensors weights in it.
        ValueError: the weights are quantised, so that an update cannot be added to them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"base={str(folder)!r} is no folder: give the local folder of the base model; "
            "huggingface_hub.snapshot_download brings one from the hub."
        )
    stored = folder / "config.json"
    config = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    if config.get("quantization_config"):
        raise ValueError(
            f"base={str(folder)!r} is quantised: an update cannot be added to its weights. Merge into the "
            "unquantised model, or serve the adapter beside this one (--to ragged)."
        )
    if (folder / INDEX).is_file():
        shard_of = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return BaseFiles(folder, tuple(dict.fromkeys(shard_of.values())), shard_of, config)
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(
            f"base={str(folder)!r} holds neither {SINGLE} nor {INDEX}: save the model with "
            "save_pretrained, which writes safetensors."
        )
    with safe_open(folder / SINGLE, framework="pt") as file:
        return BaseFiles(folder, (SINGLE,), dict.fromkeys(file.keys(), SINGLE), config)


@dataclass(frozen=True)
class NameMap:
    """How module names of the trained model become tensor names of the base's files.

    Attributes:
        removed: prefix that the trained model has and the files have not, such as "bert.".
        added: prefix that the files have and the trained model has not.
    """

    removed: str = ""
    added: str = ""

    def key(self, name: str, *, suffix: str = ".weight") -> str:
        """Tensor name of a module's weight."""
        plain = name.replace(".base_layer", "")
        return self.added + plain.removeprefix(self.removed) + suffix


def name_map(names: Iterable[str], base: BaseFiles) -> tuple[NameMap, dict[str, str]]:
    """The one prefix rule under which every adapted module has its weight, and these weights' names.

    Raises:
        ValueError: no rule fits, so this is not the adapter's base model.
    """
    names = list(names)
    first = names[0].split(".")
    removals = [".".join(first[:i]) + "." for i in range(1, len(first))]
    heads = sorted({key.split(".")[0] + "." for key in base.shard_of})
    rules = [
        NameMap(),
        *(NameMap(removed=prefix) for prefix in removals),
        *(NameMap(added=prefix) for prefix in heads),
    ]
    found: dict[str, str] = {}
    for rule in rules:
        keys = {n: key for n in names if (key := weight_key(n, rule, base)) is not None}
        if len(keys) == len(names):
            return rule, keys
        found = max(found, keys, key=len)
    missing = [n for n in names if n not in found]
    raise ValueError(
        f"base={str(base.folder)!r} has no weight for {len(missing)} of {len(names)} adapted modules, such "
        f"as {missing[0]!r}: it is another model, or the module shares its weight with another (tied "
        "embeddings), which merging would change too. Use --to ragged."
    )


def weight_key(name: str, rule: NameMap, base: BaseFiles) -> str | None:
    """Name of the tensor that an adapted module's update belongs to; None if the base lacks it."""
    suffixes = [".weight"] if name.endswith(OUT_PROJECTION) else [".weight", ".in_proj_weight"]
    keys = [rule.key(name, suffix=suffix) for suffix in suffixes]
    return next((key for key in keys if key in base.shard_of), None)
