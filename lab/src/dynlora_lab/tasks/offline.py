"""``offline:NAME`` in a recipe: a model or data set that ``dynlora assets fetch NAME`` has brought."""

from pathlib import Path

from datasets import DatasetDict, load_dataset

from dynlora_lab.tasks.assets import AssetError, asset_folder, find_asset
from dynlora_lab.tasks.assets.cache import read_manifest
from dynlora_lab.tasks.typed_fields import RecipeError

WEIGHTS = ".safetensors"


def offline_model(name: str) -> str:
    """Folder of a fetched model, for ``model: offline:NAME``.

    Raises:
        RecipeError: there is no model of that name, or it has not been fetched.
    """
    return str(_folder(name, kind="model"))


def weights_sha256(name: str) -> list[str]:
    """Hashes of the weights of a fetched model: some are trained at the fetch, so copies may differ.

    Raises:
        RecipeError: there is no model of that name, or it has not been fetched.
    """
    files = read_manifest(_folder(name, kind="model"))["files"]
    return [facts["sha256"] for file, facts in sorted(files.items()) if file.endswith(WEIGHTS)]


def offline_data(name: str) -> DatasetDict:
    """Splits train and validation of fetched data, for ``data: {name: offline:NAME}``.

    Raises:
        RecipeError: there is no data set of that name, or it has not been fetched.
    """
    folder = _folder(name, kind="data")
    files = {path.stem: str(path) for path in sorted(folder.glob("*.parquet"))}
    return load_dataset("parquet", data_files=files)


def _folder(name: str, *, kind: str) -> Path:
    try:
        asset = find_asset(name)
        if asset.kind != kind:
            raise AssetError(f"offline asset {name!r} is {asset.kind}, and {kind} is needed here.")
        return asset_folder(asset.name)
    except AssetError as error:
        raise RecipeError(str(error)) from error
