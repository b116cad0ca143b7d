"""An adapter folder is read with suspicion: everything is checked before the base model is touched.

Stock PEFT injects layers first and reads the weights afterwards, and it passes entries that belong to no
adapter on to the base model. Here a folder that is damaged, made for another model, or made to do harm
is refused while the model is still as it was.
"""

import contextlib
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
from huggingface_hub.dataclasses import type_validator
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dynlora.adapter_files.folder import damaged, read_config
from dynlora.adapter_files.format import (
    CONFIG_FILE,
    OUT_PROJECTION,
    PICKLE_FILE,
    WEIGHTS_FILE,
    by_pattern,
    is_unknown_part,
    parse_key,
)
from dynlora.errors import AdapterFileError
from dynlora.lora.configs import targetable_names

MAX_RANK = 1024
"""Rank that a config may ask for without a weights file that holds as much."""

_RANK_DIM = {"A": 0, "B": 1, "c": 0, "ema": 0, "live": 0}
_DAMAGED = "The file is damaged; download the folder again."


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter file holds; all checks raise AdapterFileError.

    Attributes:
        shapes: shapes of A and B by module; None where the module has rank 0.
        others: entries that are no part of the adapter's factors.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]] | None]
    others: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "StoredAdapter":
        """Group the entries of a file by module, and check them against each other."""
        modules: dict[str, dict[str, Tensor]] = {}
        others = []
        for key, tensor in tensors.items():
            if is_unknown_part(key):
                raise AdapterFileError(
                    f"entry {key!r} is unknown: the adapter uses a variant of LoRA, or was written by a "
                    "newer dynlora. Upgrade, or export it as a plain LoRA with the version that wrote it."
                )
            parsed = parse_key(key)
            if parsed is None:
                others.append(key)
            else:
                modules.setdefault(parsed.module, {})[parsed.part] = tensor
        if not modules:
            raise AdapterFileError(
                f"{WEIGHTS_FILE} holds no adapter: none of its entries is named lora_. Save the adapter "
                "with save_pretrained, which names them so."
            )
        shapes = {name: _checked_shapes(name, parts) for name, parts in modules.items()}
        return cls(shapes, tuple(others))

    def check_against(self, model: nn.Module, config: Any) -> None:
        """Refuse an adapter that was made for another base model, before anything is injected into it.

        Its modules may be absent, of other widths, targeted without weights, or absurdly large.
        """
        self.check_others(model, config)
        if config.target_modules is None or config.target_modules == "all-linear":
            raise AdapterFileError(
                f"target_modules={config.target_modules!r} in {CONFIG_FILE} must name the modules, as PEFT "
                f"saves it. {_DAMAGED}"
            )
        present = dict(model.named_modules())
        named = config.base_model_name_or_path
        another = "it was made for another base model" + (f", {named!r}" if named else "")
        for name, shapes in self.shapes.items():
            if name.removesuffix(OUT_PROJECTION) not in present:
                raise AdapterFileError(
                    f"module {name!r} of the adapter is not in {type(model).__name__}: {another}. Load "
                    "that one."
                )
            widths = _widths(present.get(name))
            if shapes and widths and (shapes[0][1], shapes[1][0]) != widths:
                raise AdapterFileError(
                    f"module {name!r} maps {widths[0]} to {widths[1]} features, its adapter "
                    f"{shapes[0][1]} to {shapes[1][0]}: {another}. Load that one."
                )
        try:
            for name in targetable_names(model):
                if _is_targeted(config, name):
                    self._check_rank(name, by_pattern(config.rank_pattern, name, config.r))
        except re.error as error:
            raise AdapterFileError(
                f"target_modules, exclude_modules, layers_pattern and the keys of rank_pattern in "
                f"{CONFIG_FILE} must be regular expressions: {error}. {_DAMAGED}"
            ) from error

    def _check_rank(self, name: str, rank: int) -> None:
        if name not in self.shapes:
            raise AdapterFileError(
                f"module {name!r} is targeted, but {WEIGHTS_FILE} holds nothing for it: config and weights "
                "are of different adapters. Download the folder again."
            )
        shapes = self.shapes[name]
        if rank > max(MAX_RANK, shapes[0][0] if shapes else 0):
            raise AdapterFileError(
                f"module {name!r} has rank {rank} in the config, more than {MAX_RANK} and than the weights "
                f"hold: {CONFIG_FILE} is damaged, or made to exhaust the memory. Download the folder "
                "again, from a source that you trust."
            )

    def check_others(self, model: nn.Module, config: Any) -> None:
        """Refuse entries that would overwrite weights of the base model that no adapter may bring.

        Allowed are what ``modules_to_save``, ``bias`` and ``trainable_token_indices`` name, and the
        embeddings, which PEFT saves by itself where a vocabulary was resized.
        """
        known = [*(config.modules_to_save or ()), "embed_tokens", "lm_head"]
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            with contextlib.suppress(NotImplementedError):  # a model has two vocabularies or none
                embedding = getattr(model, getter, lambda: None)()
                known += [n for n, m in model.named_modules() if m is embedding]
        for key in self.others:
            is_bias = config.bias != "none" and key.endswith(".bias")
            is_token = config.trainable_token_indices and "trainable_tokens" in key
            # PEFT saves every module whose name ends so: DistilBERT's pre_classifier with the classifier
            if not is_bias and not is_token and not any(f"{n}." in key for n in known):
                raise AdapterFileError(
                    f"entry {key!r} belongs to no adapter: loading it would overwrite a weight of the base "
                    "model. Remove it, or name its module in modules_to_save if it was trained."
                )

    def check_modules(self, names: Sequence[str]) -> None:
        """Refuse weights for other modules than ``names``, which are adapted in the model.

        Those of rank 0 in the file need no place in the model.
        """
        homeless = sorted(n for n, s in self.shapes.items() if s and n not in names)
        empty = sorted(set(names) - self.shapes.keys())
        if homeless or empty:
            raise AdapterFileError(
                f"modules differ: the weights hold {homeless[:3]}, which are not adapted in the model, and "
                f"nothing for {empty[:3]}, which are. Load them into an adapter of the same target_modules."
            )


def read_folder(folder: Path, hints: Mapping[str, Any]) -> StoredAdapter | None:
    """What a DynLora adapter folder holds, checked; None for a folder with a config for training only.

    Args:
        folder: with an adapter_config.json.
        hints: types of the config's fields, which PEFT would stumble over halfway through an injection;
            numbers are left to the config's own checks, unknown fields to PEFT, which warns of them.

    Raises:
        AdapterFileError: files are missing, damaged or inconsistent.
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
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if fields.get("inference_mode") or (folder / PICKLE_FILE).exists():  # PEFT saved weights
            raise AdapterFileError(
                f"folder holds no {WEIGHTS_FILE}, and a pickle, which could run code, is not read. Save "
                "the adapter with save_pretrained, which writes it."
            )
        return None
    try:
        return StoredAdapter.of(load_file(path))
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(damaged(path, error)) from error


def _checked_shapes(
    name: str, parts: Mapping[str, Tensor]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shapes of a module's A and B, None where it has rank 0."""
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    is_dropped = shapes == {"ema": (0,), "live": (0,)}
    is_whole = shapes.keys() == _RANK_DIM.keys() and all(
        len(s) >= 2 if p in {"A", "B"} else len(s) == 1 for p, s in shapes.items()
    )
    if not is_dropped and not (is_whole and len({s[_RANK_DIM[p]] for p, s in shapes.items()}) == 1):
        raise AdapterFileError(
            f"module {name!r} holds parts of the shapes {shapes}, which must be {', '.join(_RANK_DIM)}, "
            f"all of one rank. Download the folder again; a plain LoRA, without c, loads with peft_type "
            f"LORA in {CONFIG_FILE}."
        )
    for part, tensor in parts.items():
        kind = "booleans" if part == "live" else "finite real numbers"
        is_kind = tensor.dtype == torch.bool if part == "live" else tensor.is_floating_point()
        if not is_kind or not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{part} of module {name!r}, of dtype {tensor.dtype}, must hold {kind}: the run that "
                "wrote it had failed, or the file is damaged. Use an earlier checkpoint, or download the "
                "folder again."
            )
    return None if is_dropped else (shapes["A"], shapes["B"])


def _is_targeted(config: Any, name: str) -> bool:
    is_saved = bool(set(config.modules_to_save or ()) & set(name.split(".")))
    return not is_saved and bool(check_target_module_exists(config, name))


def _widths(module: nn.Module | None) -> tuple[int, int] | None:
    """Input and output features of the module; None for a kind without, and vocabularies may grow."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for names in (("in_features", "out_features"), ("in_channels", "out_channels"), ("nx", "nf")):
        widths = tuple(getattr(base, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]  # two of them
    return None
