"""Writing folders that are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from dynlora.export.source import WEIGHTS_FILE


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
