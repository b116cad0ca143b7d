"""Writing folders that are there whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from dynlora.export.source import CONFIG_FILE, WEIGHTS_FILE

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


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, whose files become its own when the block ends well.

    In a folder that exists, files of the same name are replaced one by one, configs last.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            for file in sorted(temporary.iterdir(), key=lambda f: (f.suffix == ".json", f.name)):
                file.replace(folder / file.name)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """A PEFT adapter folder: config and weights."""
    with whole_folder(folder) as temporary:
        save_file(dict(tensors), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
        _trim_config(temporary / CONFIG_FILE)


def _trim_config(path: Path) -> None:
    """Leave out fields that newer PEFTs added and that say nothing: older ones warn about them."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    defaults = LoraConfig().to_dict() | {"peft_version": stored.get("peft_version")}
    kept = {
        name: value
        for name, value in stored.items()
        if name in _EVERYWHERE or value != defaults.get(name)
    }
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
