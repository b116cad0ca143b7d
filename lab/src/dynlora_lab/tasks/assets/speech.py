"""Recorded telephone prompts with their wording, from Debian's Asterisk packages."""

import gzip
import io
import wave
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet

from dynlora_lab.tasks.assets.noise import bad_line
from dynlora_lab.tasks.assets.tables import write_parts, write_split

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


def build_noisy_prompts(parts: Mapping[str, Path], destination: Path) -> None:
    """The rows of phone-prompts as they would be heard on a bad line; the wording seeds the noise."""
    splits = {}
    for split in ("train", "validation"):
        rows = pyarrow.parquet.read_table(parts["phone-prompts"] / f"{split}.parquet").to_pylist()
        splits[split] = [row | {"audio": _heard_badly(row["audio"], row["text"])} for row in rows]
    write_parts(splits, destination)


def _heard_badly(audio: Mapping[str, bytes], text: str) -> dict[str, bytes]:
    with wave.open(io.BytesIO(audio["bytes"])) as spoken:
        rate = spoken.getframerate()
        samples = np.frombuffer(spoken.readframes(spoken.getnframes()), dtype="<i2") / 2**15
    noisy = bad_line(samples, rate, zlib.crc32(text.encode()))
    file = io.BytesIO()
    with wave.open(file, "wb") as heard:
        heard.setnchannels(1)
        heard.setsampwidth(2)  # bytes
        heard.setframerate(rate)
        heard.writeframes((noisy * (2**15 - 1)).astype("<i2").tobytes())
    return {**audio, "bytes": file.getvalue()}
