"""Whether a stored adapter was made for this base model: decided before anything is injected."""

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from dynlora.adapter_files.format import CONFIG_FILE, OUT_PROJECTION, WEIGHTS_FILE
from dynlora.errors import AdapterFileError
from dynlora.gated.adapter_file import StoredAdapter
from dynlora.lora.configs import targetable_names

MAX_RANK = 1024
"""Rank that any module may have; beyond it, no more than the module is wide."""


def check_against_base(model: nn.Module, config: Any, stored: StoredAdapter) -> None:
    """Refuse an adapter that was made for another base model, before anything is injected.

    Args:
        model: the base model.
        config: the adapter's config.
        stored: what the adapter's file holds.

    Raises:
        AdapterFileError: modules are absent, targeted without weights, of other widths, or too large, or
            an entry names a weight of the base model.
    """
    stored = _under_present_names(model, stored)
    check_others(model, config, stored)
    if config.target_modules is None or config.target_modules == "all-linear":
        raise AdapterFileError(
            f"target_modules={config.target_modules!r} in {CONFIG_FILE} must name the modules, as PEFT "
            "saves it: the file is damaged. Download the folder again."
        )
    present = {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in model.named_modules()
    }
    for name, shapes in stored.shapes.items():
        if name.removesuffix(OUT_PROJECTION) not in present:
            raise AdapterFileError(
                f"module {name!r} of the adapter is not in {type(model).__name__}: the adapter was made "
                f"for another base model{_its_name(config)}. Load that one."
            )
        module = present.get(name)
        widths = (
            None if isinstance(module, nn.Embedding) else _widths(module)
        )  # vocabularies may grow
        if shapes and widths and (shapes[0][1], shapes[1][0]) != widths:
            raise AdapterFileError(
                f"module {name!r} maps {widths[0]} to {widths[1]} features, its adapter "
                f"{shapes[0][1]} to {shapes[1][0]}: it was made for another base "
                f"model{_its_name(config)}. Load that one."
            )
    for name in targetable_names(model):
        if _widths(present[name]) and _is_targeted(config, name):
            _check_rank(name, present[name], config, stored)


def _under_present_names(model: nn.Module, stored: StoredAdapter) -> StoredAdapter:
    """The stored adapter with the names that modules have now, where transformers has renamed them."""
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    shapes = {}
    for name, shape in stored.shapes.items():
        for pattern, replacement in mapping.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                name = renamed
                break
        shapes[name] = shape
    return StoredAdapter(shapes, stored.others)


def check_others(model: nn.Module, config: Any, stored: StoredAdapter) -> None:
    """Refuse entries that would overwrite weights of the base model that no adapter may bring.

    Allowed are what ``modules_to_save``, ``bias`` and ``trainable_token_indices`` name, and the embeddings,
    which PEFT saves by itself where a vocabulary was resized.
    """
    known = [*(config.modules_to_save or ()), "embed_tokens", "lm_head"]
    embeddings = _embeddings(model)
    known += [name for name, module in model.named_modules() if module in embeddings]
    for key in stored.others:
        is_bias = config.bias != "none" and key.endswith(".bias")
        is_token = config.trainable_token_indices and "trainable_tokens" in key
        # PEFT saves every module whose name ends so: DistilBERT's pre_classifier with the classifier
        if not is_bias and not is_token and not any(f"{n}." in key for n in known):
            raise AdapterFileError(
                f"entry {key!r} belongs to no adapter: loading it would overwrite a weight of the base "
                "model. Remove it, or name its module in modules_to_save if it was trained."
            )


def _embeddings(model: nn.Module) -> list[nn.Module]:
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter, lambda: None)())
        except NotImplementedError:  # transformers, of a model with two vocabularies or none
            continue
    return [embedding for embedding in found if embedding is not None]


def check_same_modules(names: list[str], stored: StoredAdapter) -> None:
    """Refuse weights of other modules than the adapter in the model has.

    Args:
        names: the modules that are adapted in the model.
        stored: what is about to be loaded into them.

    Raises:
        AdapterFileError: modules differ; those of rank 0 in ``stored`` need no place in the model.
    """
    homeless = sorted(n for n, s in stored.shapes.items() if s and n not in names)
    empty = sorted(set(names) - stored.shapes.keys())
    if homeless or empty:
        raise AdapterFileError(
            f"modules differ: the weights hold {homeless[:3]}, which are not adapted in the model, and "
            f"nothing for {empty[:3]}, which are. Load them into an adapter of the same target_modules."
        )


def _its_name(config: Any) -> str:
    name = config.base_model_name_or_path
    return f", {name!r}" if name else ""


def _is_targeted(config: Any, name: str) -> bool:
    try:
        saved = set(config.modules_to_save or ()) & set(name.split("."))
        return not saved and bool(check_target_module_exists(config, name))
    except re.error as error:
        raise AdapterFileError(
            f"target_modules, exclude_modules or layers_pattern of {CONFIG_FILE} is not a regular "
            f"expression: {error}. The file is damaged; download the folder again."
        ) from error


def _check_rank(name: str, module: nn.Module, config: Any, stored: StoredAdapter) -> None:
    if name not in stored.shapes:
        raise AdapterFileError(
            f"module {name!r} is targeted, but {WEIGHTS_FILE} holds nothing for it: config and weights are "
            "of different adapters. Download the folder again."
        )
    try:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    except re.error as error:
        raise AdapterFileError(
            f"rank_pattern={config.rank_pattern!r} in {CONFIG_FILE} must have regular expressions as keys: "
            f"{error}. The file is damaged; download the folder again."
        ) from error
    limit = max(MAX_RANK, *(_widths(module) or ()))
    if rank > limit:
        raise AdapterFileError(
            f"module {name!r} has rank {rank} in the config, more than {limit}: {CONFIG_FILE} is "
            "damaged, or made to exhaust the memory. Download the folder again, from a source that you "
            "trust."
        )


def _widths(module: nn.Module | None) -> tuple[int, int] | None:
    """Input and output features of the module, None for a kind that is not compared."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    pairs = (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf"))
    for first, second in pairs:
        if isinstance(getattr(module, first, None), int):
            return getattr(module, first), getattr(module, second)
    return None
