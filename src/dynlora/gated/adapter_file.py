"""An adapter folder is read with suspicion: everything is checked before the base model is touched.

Stock PEFT injects layers first and reads the weights afterwards, and it passes entries that belong to no
adapter on to the base model. Here a folder that is damaged, made for another model, or made to do harm
is refused while the model is still as it was.
"""

import pickle
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
from huggingface_hub.dataclasses import type_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dynlora.adapter_files.folder import read_config
from dynlora.adapter_files.format import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    is_unknown_part,
    parse_key,
)
from dynlora.errors import AdapterFileError

_RANK_DIM = {"A": 0, "B": 1, "c": 0, "ema": 0, "live": 0}


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter file holds.

    Attributes:
        shapes: shapes of A and B by module; None where the module has rank 0.
        others: entries that are no part of the adapter's factors.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]] | None]
    others: tuple[str, ...]


def read_folder(folder: Path) -> StoredAdapter | None:
    """What a DynLora adapter folder holds, checked; None for a folder with a config for training only.

    Raises:
        AdapterFileError: files are missing, damaged or inconsistent.
    """
    fields = read_config(folder)
    has_weights = any((folder / n).exists() for n in (WEIGHTS_FILE, PICKLE_FILE))
    if not has_weights and not fields.get("inference_mode"):
        return None  # PEFT sets inference_mode wherever it writes weights
    return check_tensors(_read_weights(folder))


def check_fields(fields: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse fields of a wrong type, which PEFT would stumble over halfway through an injection.

    Args:
        fields: as read from adapter_config.json. Unknown ones are left to PEFT, which warns of them.
        hints: types of the config class; numbers are left to the class's own checks.

    Raises:
        AdapterFileError: a field has another type, or names a module to be imported.
    """
    for name, value in fields.items():
        kinds = set(get_args(hints.get(name)) or (hints.get(name),))
        is_nested = isinstance(value, dict) and any(is_dataclass(kind) for kind in kinds)
        if name not in hints or is_nested or kinds <= {int, float, NoneType}:
            continue
        try:
            type_validator(name, value, hints[name])
        except (TypeError, ValueError) as error:
            raise AdapterFileError(
                f"{CONFIG_FILE} holds {name}={reprlib.repr(value)} of type {type(value).__name__}, "
                "where PEFT expects another type: the file is damaged. Download the folder again."
            ) from error
    if fields.get("megatron_core") not in {None, "megatron.core"}:
        raise AdapterFileError(
            f"{CONFIG_FILE} asks to import megatron_core={fields['megatron_core']!r}: an adapter must not "
            "choose which code runs. Remove the field."
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path, pickled = folder / WEIGHTS_FILE, folder / PICKLE_FILE
    if not path.is_file() and pickled.is_file():
        return _read_pickle(pickled)
    if not path.is_file():
        raise AdapterFileError(
            f"folder holds no {WEIGHTS_FILE}. Save the adapter with save_pretrained, which writes it."
        )
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{WEIGHTS_FILE} is not a safetensors file ({error}): it is truncated, damaged or something "
            "else under this name. Download the folder again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Weights that PEFT wrote with ``safe_serialization=False``; nothing but tensors is unpickled."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(
            f"{PICKLE_FILE} holds something other than tensors ({type(error).__name__}): loading it "
            "could run code, so it is refused. Ask for the adapter as safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(
            f"{PICKLE_FILE} does not hold a dictionary of tensors. Ask for the adapter as safetensors."
        )
    return tensors


def check_tensors(tensors: Mapping[str, Tensor]) -> StoredAdapter:
    """Group the entries of an adapter file by module and check them against each other.

    Args:
        tensors: entries as in the file, without the adapter's name.

    Raises:
        AdapterFileError: a rule is broken; the message names the entry.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        if is_unknown_part(key):
            raise AdapterFileError(
                f"entry {key!r} is unknown: the adapter uses a variant of LoRA, or was written by a newer "
                "dynlora. Upgrade, or export it as a plain LoRA with the version that wrote it."
            )
        parsed = parse_key(key)
        if parsed is None:
            others.append(key)
        else:
            modules.setdefault(parsed.module, {})[parsed.part] = tensor
    if not modules:
        raise AdapterFileError(
            f"{WEIGHTS_FILE} holds no adapter: none of its entries is named "
            "lora_. Save the adapter with save_pretrained, which names them so."
        )
    for name, parts in modules.items():
        _check_module(name, parts)
    shapes = {
        name: (tuple(p["A"].shape), tuple(p["B"].shape)) if "A" in p else None
        for name, p in modules.items()
    }
    return StoredAdapter(shapes, tuple(others))


def _check_module(name: str, parts: Mapping[str, Tensor]) -> None:
    if "c" not in parts and {"A", "B"} <= parts.keys():
        raise AdapterFileError(
            f"module {name!r} has factors without gates: this is a plain LoRA, not a DynLora adapter. Set "
            f"peft_type to LORA in {CONFIG_FILE} to load it as one."
        )
    is_dropped = parts.keys() == {"ema", "live"} and all(t.numel() == 0 for t in parts.values())
    if not is_dropped and parts.keys() != _RANK_DIM.keys():
        raise AdapterFileError(
            f"module {name!r} has {sorted(parts)} and lacks {sorted(_RANK_DIM.keys() - parts.keys())}: "
            "the file is incomplete. Download the folder again."
        )
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    factors = (shapes.get("A", (0, 0)), shapes.get("B", (0, 0)))
    is_shaped = all(len(s) >= 2 for s in factors) and all(
        len(s) == 1 for p, s in shapes.items() if p not in {"A", "B"}
    )
    if not is_shaped or len({s[_RANK_DIM[p]] for p, s in shapes.items()}) != 1:
        raise AdapterFileError(
            f"module {name!r} has parts of different ranks: {shapes}. The file is damaged; "
            "download the folder again."
        )
    for part, tensor in parts.items():
        if tensor.is_floating_point() == (part == "live") or tensor.is_complex():
            raise AdapterFileError(
                f"{part} of module {name!r} has dtype {tensor.dtype}, but must be "
                f"{'bool' if part == 'live' else 'real floating point'}: the file is damaged. Download "
                "the folder again."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{part} of module {name!r} holds NaN or infinity: the run that wrote it had failed. "
                "Use an earlier checkpoint."
            )
