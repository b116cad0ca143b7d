"""Fetching: carriers are downloaded and checked, the asset is built beside its place and moved in."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from dynlora_lab.tasks.assets.cache import (
    MANIFEST,
    AssetError,
    asset_folder,
    cache_folder,
    check_sha256,
    write_manifest,
)
from dynlora_lab.tasks.assets.carriers import Announce, unpacked
from dynlora_lab.tasks.assets.catalogue import CATALOGUE, DEFAULT_ENCODER, Asset, find_asset
from dynlora_lab.tasks.assets.hub import fetch_from_hub


def pretrained_encoder(model: str | None = None, *, announce: Announce = lambda _: None) -> str:
    """A name or folder that ``from_pretrained`` of transformers takes.

    Any ``model`` that is given is passed through untouched. None is all-MiniLM-L6-v2 (22.7 million
    parameters, Apache-2.0), fetched at the first call.

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
    try:
        return str(fetch_asset(CATALOGUE[DEFAULT_ENCODER], announce=announce))
    except AssetError as error:
        raise AssetError(f"{error} Or name another model with --model.") from error


def fetch_with_sources(name: str, *, announce: Announce) -> Path:
    """Fetch an asset by name, after the assets that it is made from.

    Args:
        name: see :data:`CATALOGUE`.
        announce: called with a line for each step.

    Raises:
        AssetError: the name is unknown, a package is missing or the asset cannot be fetched.
    """
    asset = find_asset(name)
    for source in asset.made_from:
        fetch_with_sources(source, announce=announce)
    return fetch_asset(asset, announce=announce)


def fetch_asset(asset: Asset, *, announce: Announce) -> Path:
    """The asset's folder in the cache; it appears complete and checked, or not at all.

    A folder without a manifest, as an earlier version left it, is fetched anew.

    Raises:
        AssetError: a package that builds it is missing, a carrier cannot be fetched, or weights do
            not have the expected sha256.
    """
    folder = cache_folder() / asset.name
    if not (folder / MANIFEST).is_file():
        _check_packages(asset)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="incoming-") as scratch:
            incoming = Path(scratch) / asset.name
            announce(f"Fetching {asset.name}, only once, into {folder.parent}")
            if asset.hub is None or not fetch_from_hub(asset.hub, incoming):
                incoming = Path(scratch) / "built"
                incoming.mkdir()
                _build(asset, incoming, Path(scratch), announce)
            _check_weights(asset, incoming, "Nothing was kept; retry")
            write_manifest(incoming, asset.facts())
            if not (folder / MANIFEST).is_file():  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                incoming.replace(folder)
    _check_weights(asset, folder, f"Delete {folder} and retry")
    return asset_folder(asset.name)


def _build(asset: Asset, incoming: Path, scratch: Path, announce: Announce) -> None:
    if asset.hub is not None:
        announce(
            f"No copy of {asset.name} from the Hugging Face hub; taking the same files elsewhere"
        )
    parts: dict[str, Path] = {source: asset_folder(source) for source in asset.made_from}
    for carrier in asset.carriers:
        parts[carrier.name] = scratch / "parts" / carrier.name
        unpacked(carrier, parts[carrier.name], announce=announce)
    announce(f"Building {asset.name}: {asset.what}")
    asset.build(parts, incoming)


def _check_packages(asset: Asset) -> None:
    missing = [p for p in asset.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise AssetError(
            f"building {asset.name} needs {', '.join(missing)}; pip install 'dynlora-lab[assets]'."
        )


def _check_weights(asset: Asset, folder: Path, way_out: str) -> None:
    if asset.weights_sha256:
        check_sha256(folder / "model.safetensors", asset.weights_sha256, way_out=way_out)
