"""Opening an adapter folder: its config and the header of its weights, without torch."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dynlora.adapter_files.format import (
    CONFIG_FILE,
    PICKLE_FILE,
    PRUNED,
    WEIGHTS_FILE,
    group_of,
    is_targeted,
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
        AdapterFileError: it is not a JSON object, or absurdly large.
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


def pruned_modules(
    folder: Path, fields: Mapping[str, Any], present: Collection[str]
) -> tuple[str, ...]:
    """Modules of rank 0 that have no tensors in the folder, as far as it is known that they were pruned.

    What ``exclude_modules`` names may be the user's choice. Known is what the run's history beside the
    checkpoint, or in the folder above it, lists as adapted; what an export noted in the weights file;
    what a gated config names with rank 0; and what ``target_modules`` names in full.

    Args:
        folder: of the adapter.
        fields: of its config.
        present: modules that have tensors.
    """
    groups = {group_of(name) for name in present}
    known = set(_adapted_at_start(folder)) if groups else set()
    if not groups <= {group_of(name) for name in known}:
        known = set()  # another run's history
    known = {name for name in known if not _is_parameter(fields, name)}
    known |= _noted(folder / WEIGHTS_FILE)
    gated = fields.get("rank_pattern") if fields.get("peft_type") == "DYNLORA" else None
    known |= {
        key.removeprefix("^").replace("\\", "") for key, rank in (gated or {}).items() if rank == 0
    }
    targets = fields.get("target_modules")
    named = targets if isinstance(targets, list) else []
    known |= {name for name in named if _is_full(name, groups) and is_targeted(fields, name)}
    return tuple(sorted({group_of(name) for name in known} - groups))


def _adapted_at_start(folder: Path) -> list[str]:
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    for place in places:
        if (place / HISTORY_FILE).is_file():
            starts = [e for e in read_history(place) if e["event"] == "start" and e.get("ranks")]
            return list(starts[0]["ranks"]) if starts else []
    return []


def _noted(file: Path) -> set[str]:
    with safe_open(file, framework="np") as opened:
        noted = json.loads((opened.metadata() or {}).get(PRUNED, "[]"))
    return set(noted) if isinstance(noted, list) else set()


def _is_parameter(fields: Mapping[str, Any], name: str) -> bool:
    """Whether the name is that of an adapted parameter, whose module always stays adapted."""
    targets = fields.get("target_parameters") or ()
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _is_full(name: str, groups: Collection[str]) -> bool:
    """Whether a target is a module's whole name: it begins as the adapted modules' names do."""
    return any(name.split(".")[0] == group.split(".")[0] for group in groups) and not any(
        f".{group}".endswith(f".{name}") and group != name for group in groups
    )
