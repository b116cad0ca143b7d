"""Files that are there whole or not at all."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> Path:
    """Write in one piece: an older file stays until the new one is whole; gives ``path`` back."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".new-", delete=False, encoding="utf8"
    ) as file:
        file.write(text)
    new = Path(file.name)
    new.chmod(0o644)
    return new.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """The same for plain values, as JSON."""
    return write_whole(path, json.dumps(content, indent=1) + "\n")
