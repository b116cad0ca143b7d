"""Files of a pinned revision from the Hugging Face hub, given up early where no hub answers."""

import shutil
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from huggingface_hub import constants, hf_hub_url

HUB_DEADLINE_S = 10.0
READ_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class HubCopy:
    """The same model on the hub."""

    repository: str
    revision: str
    files: tuple[str, ...]  # first a small one: it tells quickly whether the hub answers


def fetch_from_hub(copy: HubCopy, destination: Path) -> bool:
    """Download into the new folder ``destination``; False if the hub is off, silent or breaks off."""
    if constants.HF_HUB_OFFLINE:
        return False
    destination.mkdir()
    probe, *rest = copy.files
    if not _finishes_within(HUB_DEADLINE_S, lambda: _download(copy, probe, destination)):
        return False
    return all(_download(copy, name, destination) for name in rest)


def _finishes_within(deadline_s: float, task: Callable[[], bool]) -> bool:
    """Whether ``task`` succeeds in time. A socket timeout alone bounds neither DNS nor retries."""
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(task()), daemon=True)
    thread.start()
    thread.join(deadline_s)
    return any(outcome)


def _download(copy: HubCopy, name: str, destination: Path) -> bool:
    url = hf_hub_url(copy.repository, name, revision=copy.revision)
    try:
        with (
            urllib.request.urlopen(url, timeout=READ_TIMEOUT_S) as answer,  # noqa: S310 (the hub's https)
            (destination / name).open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
            return not answer.length  # bytes still due: the connection broke off
    except (OSError, HTTPException):
        return False
