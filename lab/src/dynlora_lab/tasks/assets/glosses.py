"""The noun definitions of WordNet that this package ships, split as the demo splits them."""

import csv
import gzip
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from dynlora_lab.tasks.assets.tables import write_parts

_SPLITS = {"train": "train", "validation": "test"}


def build_glosses(_parts: Mapping[str, Path], destination: Path) -> None:
    """Columns text, label (26 classes)."""
    shipped = files("dynlora_lab.data") / "wordnet_glosses.csv.gz"
    text = gzip.decompress(shipped.read_bytes()).decode("utf8")
    rows = list(csv.DictReader(text.splitlines()))
    write_parts(
        {
            name: [{"text": r["text"], "label": r["label"]} for r in rows if r["split"] == split]
            for name, split in _SPLITS.items()
        },
        destination,
    )
