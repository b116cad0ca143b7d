"""Writing an adapter as a plain LoRA folder."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from dynlora.adapter_files.format import CONFIG_FILE, PREFIX, PRUNED, WEIGHTS_FILE
from dynlora.adapter_files.plain_config import plain_fields
from dynlora.adapter_files.updates import Adapter

_EVERYWHERE = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
})  # fmt: skip
"""Config fields that PEFT and servers of the last years know."""

_PROCESSOR_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "*.model", "*processor*.json",
)  # fmt: skip


def plain(
    adapter: Adapter, *, lists_only: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of adapter_config.json, and tensors by their key, of an adapter at its present ranks.

    Args:
        adapter: what to write; its pruned modules are left out.
        lists_only: whether target modules must be a list, as some servers want.
    """
    updates = adapter.updates
    fields = plain_fields(
        adapter.fields,
        {u.group: u.rank for u in updates},
        {u.group: u.scaling for u in updates},
        dead=adapter.pruned,
        parameters={u.group: u.parameters for u in updates if u.parameters},
        lists_only=lists_only,
    )
    depth: dict[str, int] = {}
    for update in updates:
        name = update.name.replace(".base_layer", "")
        depth[name] = depth.get(name, 0) + 1
    tensors = {_wrapped(key, depth): tensor for key, tensor in adapter.others.items()}
    for update in updates:
        tensors |= dict(zip(update.keys, (update.a, update.b), strict=True))
    return fields, tensors


def _wrapped(key: str, depth: Mapping[str, int]) -> str:
    """A key beside the LoRA with ``.base_layer`` after each module, as often as it is adapted.

    PEFT names a weight of an adapted module so, and a module may be adapted in one form only.

    >>> _wrapped("base_model.model.h.q.base_layer.bias", {}), _wrapped(PREFIX + "h.q.bias", {"h.q": 1})
    ('base_model.model.h.q.bias', 'base_model.model.h.q.base_layer.bias')
    """
    if ".lora_" in key or not key.endswith((".weight", "bias")):
        return key
    parts = key.removeprefix(PREFIX).replace(".base_layer", "").split(".")
    written: list[str] = []
    for i, part in enumerate(parts):
        written += [part, *["base_layer"] * depth.get(".".join(parts[: i + 1]), 0)]
    return PREFIX + ".".join(written)


def metadata(pruned: Collection[str]) -> dict[str, str]:
    """What the weights file notes: pruned modules, which the config cannot tell from excluded ones."""
    return {"format": "pt"} | ({PRUNED: json.dumps(sorted(pruned))} if pruned else {})


def write_adapter(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    pruned: Collection[str] = (),
) -> None:
    """Config and weights, as PEFT writes them.

    Config fields that newer PEFTs added and that say nothing are left out: older ones warn about them.
    """
    defaults = LoraConfig().to_dict()
    kept = {
        name: sorted(value) if isinstance(value, set) or _is_unordered(name, value) else value
        for name, value in fields.items()
        if name in _EVERYWHERE or value != defaults.get(name)
    }
    kept.pop("peft_version", None)
    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata=metadata(pruned))
    text = json.dumps(kept, indent=2, sort_keys=True, default=str) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _is_unordered(name: str, value: object) -> bool:
    """Whether PEFT keeps the field as a set, which it writes in another order each time."""
    return name in {"target_modules", "exclude_modules"} and isinstance(value, list)


def copy_processor(source: Path, folder: Path) -> None:
    """The files of a tokenizer or another processor, where ``source`` is a folder that holds them."""
    for pattern in _PROCESSOR_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copy2(file, folder / file.name)
