"""Recorded telephone prompts with their wording, from Debian's Asterisk packages."""

import gzip
from collections.abc import Mapping
from pathlib import Path

from dynlora_lab.tasks.assets.tables import write_split

_SOUNDS = Path("usr", "share", "asterisk", "sounds", "en_US_f_Allison")
_WORDING = Path("usr", "share", "doc", "asterisk-core-sounds-en", "core-sounds-en.txt.gz")


def build_prompts(parts: Mapping[str, Path], destination: Path) -> None:
    """Columns audio (bytes of a wav file, 8 kHz, one voice, and its name), text."""
    wording = parts["asterisk-core-sounds-en"] / _WORDING
    sounds = parts["asterisk-core-sounds-en-wav"] / _SOUNDS
    lines = gzip.decompress(wording.read_bytes()).decode("utf8", "replace").splitlines()
    rows = []
    for line in lines:
        name, colon, text = (piece.strip() for piece in line.partition(":"))
        spoken = colon and text and not line.startswith(";") and not set("[(<") & set(text)
        path = sounds / f"{name}.wav"
        if spoken and path.is_file():
            rows.append({"audio": {"bytes": path.read_bytes(), "path": path.name}, "text": text})
    write_split(rows, destination, key="text")
