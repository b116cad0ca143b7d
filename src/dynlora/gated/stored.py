"""An adapter folder is read with suspicion: everything is checked before the base model is touched.

Stock PEFT injects layers first and reads the weights afterwards, and it passes entries that belong to no
adapter on to the base model. Here a folder that is damaged, made for another model, or made to do harm
is refused while the model is still as it was.
"""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from huggingface_hub.dataclasses import type_validator
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from dynlora._private import in_out_features
from dynlora.adapter_files.folder import read_config
from dynlora.adapter_files.format import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from dynlora.adapter_files.updates import read
from dynlora.errors import AdapterFileError
from dynlora.lora.components import embeddings_of
from dynlora.lora.configs import targetable_names

_DAMAGED = "The file is damaged; download the folder again."
_MIXED = "config and weights are of different adapters. Download the folder again."


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter file holds.

    Attributes:
        widths: inputs and outputs of the factors of each module.
        others: entries that are no part of the adapter's factors.
    """

    widths: dict[str, tuple[int, int]]
    others: tuple[str, ...]

    def check_against(self, model: nn.Module, config: Any) -> None:
        """Refuse an adapter that was made for another base model, before anything is injected into it.

        Its modules may be absent, of other widths, or targeted without weights, its tokens without weights.

        Raises:
            AdapterFileError: says which.
        """
        _check_others(self.others, model, config)
        tokens = config.trainable_token_indices
        if tokens not in (None, {}) and not any("trainable_tokens" in key for key in self.others):
            raise AdapterFileError(
                f"{CONFIG_FILE} holds trainable_token_indices={reprlib.repr(tokens)}, but {WEIGHTS_FILE} "
                f"has none of them: {_MIXED}"
            )
        if config.target_modules is None or config.target_modules == "all-linear":
            raise AdapterFileError(
                f"target_modules={config.target_modules!r} in {CONFIG_FILE} must name the modules, as PEFT "
                f"saves it. {_DAMAGED}"
            )
        present = dict(model.named_modules())
        named = config.base_model_name_or_path
        another = "it was made for another base model" + (f", {named!r}" if named else "")
        for name, stored in self.widths.items():
            if name not in present:
                raise AdapterFileError(
                    f"module {name!r} of the adapter is not in {type(model).__name__}: {another}. Load "
                    "that one."
                )
            module = present[name]
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            widths = in_out_features(base)
            if None not in widths and stored != widths:
                raise AdapterFileError(
                    f"module {name!r} maps {widths[0]} to {widths[1]} features, its adapter {stored[0]} to "
                    f"{stored[1]}: {another}. Load that one."
                )
        for name in targetable_names(model):
            if name not in self.widths and _is_targeted(config, name):
                raise AdapterFileError(
                    f"module {name!r} is targeted, but {WEIGHTS_FILE} holds nothing for it: {_MIXED}"
                )


def _check_others(keys: Iterable[str], model: nn.Module, config: Any) -> None:
    """Refuse entries that would overwrite weights of the base model that no adapter may bring.

    Allowed are what ``modules_to_save``, ``bias`` and ``trainable_token_indices`` name, and the
    embeddings, which PEFT saves by itself where a vocabulary was resized.

    Raises:
        AdapterFileError: names the first of them.
    """
    known = [*(config.modules_to_save or ()), "embed_tokens", "lm_head"]
    embeddings = embeddings_of(model)
    known += [n for n, m in model.named_modules() if any(m is e for e in embeddings)]
    for key in keys:
        is_bias = config.bias != "none" and key.endswith(".bias")
        is_token = config.trainable_token_indices and "trainable_tokens" in key
        # PEFT saves every module whose name ends so: DistilBERT's pre_classifier with the classifier
        if not is_bias and not is_token and not any(f"{n}." in key for n in known):
            raise AdapterFileError(
                f"entry {key!r} belongs to no adapter: loading it would overwrite a weight of the base "
                "model. Remove it, or name its module in modules_to_save if it was trained."
            )


def read_folder(folder: Path, hints: Mapping[str, Any]) -> StoredAdapter | None:
    """What a DynLora adapter folder holds, checked; None for a folder with a config for training only.

    Args:
        folder: with an adapter_config.json.
        hints: types of the config's fields, which PEFT would stumble over halfway through an injection;
            numbers are left to the config's own checks, unknown fields to PEFT, which warns of them.

    Raises:
        FileNotFoundError: there should be weights.
        AdapterFileError: files are damaged or inconsistent.
    """
    fields = read_config(folder)
    for name, value in fields.items():
        kinds = set(get_args(hints.get(name)) or (hints.get(name),))
        is_nested = isinstance(value, dict) and any(is_dataclass(kind) for kind in kinds)
        if name not in hints or is_nested or kinds <= {int, float, NoneType}:
            continue
        try:
            type_validator(name, value, hints[name])
        except (TypeError, ValueError) as error:
            raise AdapterFileError(
                f"{CONFIG_FILE} holds {name}={reprlib.repr(value)} of type {type(value).__name__}, where "
                f"PEFT expects another type. {_DAMAGED}"
            ) from error
    has_weights = any((folder / name).exists() for name in (WEIGHTS_FILE, PICKLE_FILE))
    if not has_weights and not fields.get("inference_mode"):  # else PEFT has saved weights
        return None
    adapter = read(folder)
    widths = {u.name: (u.a.shape[1], u.b.shape[0]) for u in adapter.updates}
    return StoredAdapter(widths, tuple(adapter.others))


def _is_targeted(config: Any, name: str) -> bool:
    is_saved = bool(set(config.modules_to_save or ()) & set(name.split(".")))
    return not is_saved and bool(check_target_module_exists(config, name))
