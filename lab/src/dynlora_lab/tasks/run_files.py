"""The folder of a run: ``run.json``, whether the folder is free, and whether a run can go on in it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora import last_checkpoint
from dynlora_lab.tasks.typed_fields import RecipeError
from dynlora_lab.tasks.whole_file import write_whole
from dynlora_lab.tasks.written import FILE as WRITTEN

RUN_FILE = "run.json"
FORMAT = 1

RUNNING, INTERRUPTED, FAILED, DONE = "running", "interrupted", "failed", "done"


def write_run(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write ``run.json`` in one piece: an older one stays until the new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **content}, indent=2, default=str)
    return write_whole(folder / RUN_FILE, f"{text}\n")


def read_run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` in ``folder`` says.

    Raises:
        RecipeError: it is missing or no record of a run.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} is missing: {folder} holds no run.") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecipeError(f"{path} is no record of a run that this version reads.")
    return content


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Make sure that a new run may write to ``folder``.

    Args:
        folder: may be missing or empty.
        overwrite: whether an earlier run in it may go; nothing but a run's folder ever does.

    Raises:
        RecipeError: ``folder`` is a file, or holds another run or anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output {str(folder)!r} is a file; name a folder with --output.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        raise RecipeError(
            f"output {str(folder)!r} is not empty and no run made it: there is no {RUN_FILE}. Name "
            "another folder with --output, or empty this one."
        )
    if not overwrite:
        raise RecipeError(
            f"output {str(folder)!r} holds another run; go on with it by --resume, replace it by "
            "--overwrite, or name another folder with --output."
        )


def clear_folder(folder: Path) -> None:
    """Remove what an earlier run left that a new one would mistake for its own."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for file in (RUN_FILE, "history.jsonl", WRITTEN):
        (folder / file).unlink(missing_ok=True)


def checkpoint_to_resume(folder: Path, recipe: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The checkpoint from which the run in ``folder`` can go on, and its record so far.

    Raises:
        RecipeError: there is no run, it is finished, no checkpoint is whole, or it was made with
            another recipe (names the first field that differs).
    """
    record = read_run(folder)
    if record["status"] == DONE:
        raise RecipeError(
            f"output {str(folder)!r}: this run is finished; name another folder with --output."
        )
    plain = json.loads(json.dumps(recipe, default=str))
    different = _first_difference(record["recipe"], plain, ignored=("output",))
    if different:
        raise RecipeError(
            f"--resume: the run in {str(folder)!r} was begun with another {different}. Take that back, "
            "or start a new run in another folder."
        )
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise RecipeError(
            f"--resume: {str(folder)!r} holds no whole checkpoint; start anew with --overwrite."
        )
    return checkpoint, record


def _first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignored: tuple[str, ...] = ()
) -> str | None:
    """``name (was A, is B)`` of the first field that differs, sections opened up."""
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if name in ignored or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return f"{name}.{_first_difference(a, b)}"
        return f"{name} (was {a!r}, is {b!r})"
    return None
