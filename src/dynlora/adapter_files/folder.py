"""Opening an adapter folder: its config and the header of its weights, without torch."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dynlora.adapter_files.format import (
    CONFIG_FILE,
    PICKLE_FILE,
    PRUNED,
    WEIGHTS_FILE,
    by_module,
    group_of,
    parameters_of,
    ranks_in_config,
)
from dynlora.errors import AdapterFileError
from dynlora.history import HISTORY_FILE, read_history

MAX_CONFIG_BYTES = 2**24

Header = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each tensor in a safetensors file."""


def checked_source(folder: Path) -> Path:
    """The folder, if it holds an adapter.

    Raises:
        FileNotFoundError: config or weights are missing; the message says what to name instead.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if not missing:
        return folder
    steps = [(int(p.name[11:]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    hint = f"did you mean {max(steps)[1]}" if steps else "name the folder of an adapter"
    if (folder / PICKLE_FILE).is_file():
        hint = f"{PICKLE_FILE} is a pickle, which may run code; load and save it again with PEFT"
    raise FileNotFoundError(f"{folder} holds no {missing[0]}: {hint}.")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json, as plain data.

    Raises:
        AdapterFileError: it is not a JSON object, absurdly large, or holds broken regular expressions.
    """
    path = folder / CONFIG_FILE
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterFileError(
            f"{CONFIG_FILE} has {path.stat().st_size} bytes, the limit is {MAX_CONFIG_BYTES}: it is not "
            "an adapter's config. Download the folder again."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{CONFIG_FILE} is not JSON ({type(error).__name__}): the file is damaged. Download the "
            "folder again."
        ) from error
    if not isinstance(fields, dict):
        raise AdapterFileError(
            f"{CONFIG_FILE} holds a {type(fields).__name__}, not an object: it is not an adapter's config."
        )
    patterns = [
        fields.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")
    ]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += fields[name] if isinstance(fields.get(name), dict) else ()
    for pattern in (p for p in patterns if isinstance(p, str)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterFileError(
                f"{CONFIG_FILE} holds {pattern!r}, which PEFT reads as a regular expression: {error}. The "
                "file is damaged; download the folder again."
            ) from error
    return fields


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by tensor name of a safetensors file.

    Raises:
        AdapterFileError: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # no mapping
            return {k: (tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}
    except SafetensorError as error:
        raise AdapterFileError(damaged(path, error)) from error


def damaged(path: Path, error: object) -> str:
    """The message for a weights file that cannot be read."""
    return (
        f"{path} is not a whole safetensors file ({error}): it is truncated, damaged or something else "
        "under this name. Download the folder again."
    )


def fault(fields: Mapping[str, Any], header: Header) -> str:
    """Why an adapter's weights cannot be those of its config, by names and shapes; "" if they can."""
    modules, _ = by_module(header)
    nested = Counter(group_of(name) for name in modules)
    is_gated = fields.get("peft_type") == "DYNLORA"
    for name, keys in modules.items():
        if missing := sorted({"A", "B"} - keys.keys()):
            return f"module {name!r} has no lora_{missing[0]}; the file is incomplete."
        a, b = header[keys["A"]][0], header[keys["B"]][0]
        if is_gated and ("c" not in keys or header[keys["c"]][0] != a[:1]):
            return (
                f"module {name!r} has no gate (lora_A.c) of its rank; the file is incomplete, or it is a "
                f"plain LoRA, whose peft_type in {CONFIG_FILE} is LORA."
            )
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            return (
                f"module {name!r} has A of shape {a} and B of shape {b}: a grouped convolution, whose "
                "components cannot be told apart, or a damaged file."
            )
        group = group_of(name)
        parameters = parameters_of(fields, group)
        if parameters and len(parameters) != nested[group]:
            return (
                f"module {group!r} holds the adapters of {nested[group]} parameters, but "
                f"target_parameters names {list(parameters)} there; config and weights are of two adapters."
            )
        ranks = ranks_in_config(fields, name)
        rank = next(iter(ranks))
        fits = len(ranks) == 1 and isinstance(rank, int) and rank > 0 and a[0] % rank == 0
        if not fits or (a[0] != rank and not parameters):
            return (
                f"module {name!r} has rank {a[0]}, but {CONFIG_FILE} says {sorted(ranks)[0]} (r and "
                "rank_pattern). PEFT cannot load it either; restore the config that was saved with it."
            )
    return ""


def pruned_modules(
    folder: Path, fields: Mapping[str, Any], present: Collection[str]
) -> tuple[str, ...]:
    """Modules of rank 0 that have no tensors in the folder, as far as it is known that they were pruned.

    What ``exclude_modules`` names may be the user's choice. Known is what the run's history beside the
    checkpoint, or in the folder above it, lists as adapted; and what an export noted in the weights file.

    Args:
        folder: of the adapter.
        fields: of its config.
        present: modules that have tensors.
    """
    groups = {group_of(name) for name in present}
    known = set(_adapted_at_start(folder))
    if not groups <= {group_of(name) for name in known}:
        known = set()  # another run's history
    targets = tuple(f".{target}" for target in fields.get("target_parameters") or ())
    known = {
        name for name in known if not f".{name}".endswith(targets)
    }  # these modules stay adapted
    with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
        known |= set(json.loads((file.metadata() or {}).get(PRUNED, "[]")))
    return tuple(sorted({group_of(name) for name in known} - groups))


def _adapted_at_start(folder: Path) -> list[str]:
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    for place in places:
        if (place / HISTORY_FILE).is_file():
            starts = [e for e in read_history(place) if e["event"] == "start" and e.get("ranks")]
            return list(starts[0]["ranks"]) if starts else []
    return []
