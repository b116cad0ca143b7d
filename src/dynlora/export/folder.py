"""Writing an adapter folder."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from dynlora.adapter_files.format import CONFIG_FILE, PRUNED, WEIGHTS_FILE
from dynlora.adapter_files.whole_folder import whole_folder

_EVERYWHERE = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
})  # fmt: skip
"""Config fields that PEFT and servers of the last years know."""


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """The path, unless a file has its name.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path={str(path)!r} is a file; name a folder to export to.")
    return folder


def write_adapter(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    pruned: Collection[str] = (),
) -> None:
    """A PEFT adapter folder: config and weights.

    Config fields that newer PEFTs added and that say nothing are left out: older ones warn about them.

    Args:
        folder: to write to.
        fields: of the config.
        tensors: by key.
        pruned: modules of rank 0, noted for a later export; the config cannot tell them from what the
            user excluded.
    """
    defaults = LoraConfig().to_dict()
    kept = {
        name: sorted(value) if isinstance(value, set) or _is_unordered(name, value) else value
        for name, value in fields.items()
        if name in _EVERYWHERE or value != defaults.get(name)
    }
    kept.pop("peft_version", None)
    with whole_folder(folder) as temporary:
        note = {PRUNED: json.dumps(sorted(pruned))} if pruned else {}
        save_file(dict(tensors), temporary / WEIGHTS_FILE, metadata={"format": "pt"} | note)
        text = json.dumps(kept, indent=2, sort_keys=True, default=str) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")


def _is_unordered(name: str, value: object) -> bool:
    """Whether PEFT keeps the field as a set, which it writes in another order each time."""
    return name in {"target_modules", "exclude_modules"} and isinstance(value, list)
