"""Results on disk: one JSON file a finished cell, and the suite they belong to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_lab.bench.suite import Suite, suite_from
from dynlora_lab.tasks.typed_fields import RecipeError
from dynlora_lab.tasks.whole_file import write_json

FORMAT = 1
CELLS, WORK, SUITE_FILE = "cells", "work", "suite.json"

DONE, FAILED = "done", "failed"

Result = dict[str, Any]


def open_folder(folder: Path, suite: Suite) -> None:
    """Make a results folder, or make sure that the one there belongs to this suite.

    New seeds, methods, tasks and learning rates may come; what made existing cells must not change.

    Raises:
        RecipeError: the folder holds results of another suite, or the suite's recipes have changed.
    """
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    (folder / WORK).mkdir(exist_ok=True)
    (folder / WORK / ".gitignore").write_text("*\n", encoding="utf8")
    if (folder / SUITE_FILE).is_file():
        _check_unchanged(folder, read_suite_file(folder), suite)
    write_json(folder / SUITE_FILE, {"format": FORMAT, **suite.to_dict()})


def read_suite_file(folder: Path) -> Suite:
    """The suite that a results folder was made by.

    Raises:
        RecipeError: the folder holds no results.
    """
    try:
        values = json.loads((folder / SUITE_FILE).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{str(folder)!r} holds no results of a suite: {error}") from error
    values.pop("format", None)
    return suite_from(values)


def read_results(folder: Path) -> dict[str, Result]:
    """Every finished cell by its key; a file that is no result is an error.

    Raises:
        RecipeError: names a file that cannot be read.
    """
    found = {}
    for path in sorted((folder / CELLS).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf8"))
        except ValueError as error:
            raise RecipeError(
                f"{path} is no result: {error}; delete it to run it again."
            ) from error
        if result.get("format") != FORMAT:
            raise RecipeError(f"{path} has a format that this version does not read; delete it.")
        found[path.stem] = result
    return found


def check_one_base(results: Mapping[str, Result]) -> None:
    """Refuse cells of one task that started from different weights: a base may be trained at its fetch.

    Raises:
        RecipeError: names two cells that cannot be compared.
    """
    first: dict[str, tuple[str, list[str]]] = {}
    for key, result in results.items():
        base = result.get("base_sha256")
        if not base:
            continue
        other, known = first.setdefault(result["cell"]["task"], (key, base))
        if base != known:
            raise RecipeError(
                f"cells {other!r} and {key!r} started from base models with different weights, so they "
                "do not compare. Delete the older of them, and run them again on one base."
            )


def result_path(folder: Path, key: str) -> Path:
    """The file with the result of the cell ``key``."""
    return folder / CELLS / f"{key}.json"


def write_result(folder: Path, key: str, result: Mapping[str, Any]) -> None:
    """Keep the result of the cell ``key``."""
    write_json(result_path(folder, key), {"format": FORMAT, **result})


def _check_unchanged(folder: Path, old: Suite, new: Suite) -> None:
    where = f"{str(folder)!r} holds results of"
    if old.name != new.name:
        raise RecipeError(f"{where} suite {old.name!r}; name another folder with --results.")
    for kind in ("select", "defaults", "tasks", "methods"):
        before, after = getattr(old, kind), getattr(new, kind)
        if kind in ("tasks", "methods"):  # those that both have
            before = {k: _recipe_part(v) for k, v in before.items() if k in after}
            after = {k: _recipe_part(after[k]) for k in before}
        if json.loads(json.dumps(before)) != json.loads(json.dumps(after)):
            raise RecipeError(
                f"{where} this suite with another {kind!r}: old and new cells would not compare. Take "
                "the change back, or name another folder with --results."
            )


def _recipe_part(entry: Mapping[str, Any]) -> dict[str, Any]:
    free = ("learning_rates", "rate_factor", "report", "scale")
    return {k: v for k, v in entry.items() if k not in free}
