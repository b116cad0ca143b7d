"""The folder that keeps fetched assets, and how an asset in it is found and checked."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "asset.json"


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not what it should be."""


def cache_folder() -> Path:
    """Where assets are kept: ``$DYNLORA_CACHE``, else ``~/.cache/dynlora``."""
    return Path(os.environ.get("DYNLORA_CACHE") or "~/.cache/dynlora").expanduser()


def asset_folder(name: str) -> Path:
    """The folder of a fetched asset, complete and with the file sizes it was built with.

    Raises:
        AssetError: it has not been fetched, or a file is missing or has another size.
    """
    folder = cache_folder() / name
    if not (folder / MANIFEST).is_file():
        raise AssetError(
            f"asset {name!r} is not in {cache_folder()}; run 'dynlora assets fetch {name}', and "
            "'dynlora assets fetch --list' for what there is."
        )
    for file, expected in read_manifest(folder)["files"].items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            raise AssetError(
                f"{path} has {size} bytes where {expected['bytes']} are expected; delete {folder} "
                f"and run 'dynlora assets fetch {name}' again."
            )
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known about a fetched asset; keys: name, what, licence, sources, files."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    return manifest


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` and the size and sha256 of every file below ``folder``."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = json.dumps({**facts, "files": files}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(content + "\n", encoding="utf8")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, *, way_out: str) -> None:
    """Refuse a file that is missing or has other content.

    Raises:
        AssetError: names the file, the expected and the found sha256, and ``way_out``.
    """
    if not path.is_file():
        raise AssetError(f"{path} is missing. {way_out}.")
    found = sha256_of(path)
    if found != expected:
        raise AssetError(
            f"{path} has sha256 {found} where {expected} is expected: the file is damaged or "
            f"another one. {way_out}."
        )
