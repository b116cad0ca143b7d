"""Build the labelled sample the demo trains on: noun definitions of WordNet 3.0, 26 classes.

Reads the database of Debian's package wordnet-base (apt-get install wordnet-base) and writes
``wordnet_glosses.csv.gz`` (columns text, label, split). Same input, same bytes: rows are drawn by
the hash of their text, never by a random generator, and the gzip header holds no time.

    python lab/scripts/make_wordnet_sample.py
"""

import argparse
import collections
import csv
import gzip
import hashlib
import io
import re
from pathlib import Path

NUM_TRAIN = 8000
NUM_TEST = 1000
MIN_TEST = 2  # rows of the rarest class in the test split
MIN_WORDS = 3

# Lexicographer files of the nouns (lexnames(5WN)); numbers 3..28 in data.noun.
CLASSES = """
    Tops act animal artifact attribute body cognition communication event feeling food group
    location motive object person phenomenon plant possession process quantity relation shape
    state substance time
"""
LABELS = {number: f"noun.{name}" for number, name in enumerate(CLASSES.split(), start=3)}


def definition(gloss: str) -> str:
    """The definition in a gloss, without the quoted usage examples that may follow it.

    The word itself is left out on purpose: many lemmas hold their class in their name ("red-tailed
    hawk", "Lake Erie"), so a model could skip the definition.

    >>> definition('a single thing; "how big is that part?"; "the team is a unit"  ')
    'a single thing'
    """
    return re.split(r'[;:,]?\s*(?=(?:as in )?")', gloss, maxsplit=1)[0].strip(" ;:,\n")


def labelled_definitions(database: Path) -> list[tuple[str, str]]:
    """Every (definition, label) of the noun database whose text occurs with one label only."""
    labels_of = collections.defaultdict(set)
    text_of: dict[str, str] = {}
    with database.open(encoding="utf8") as lines:
        for line in lines:
            if line.startswith(" "):  # the licence at the top of the file
                continue
            head, _, gloss = line.partition(" | ")
            text = " ".join(definition(gloss).split())
            if len(text.split()) < MIN_WORDS:
                continue
            labels_of[text.lower()].add(LABELS[int(head.split(" ", 2)[1])])
            text_of.setdefault(text.lower(), text)
    return [(text_of[key], *labels) for key, labels in labels_of.items() if len(labels) == 1]


def stratified_counts(sizes: dict[str, int], wanted: int, *, least: int) -> dict[str, int]:
    """Rows to draw per label: proportional to ``sizes``, at least ``least``, ``wanted`` in all."""
    total = sum(sizes.values())
    counts = {label: max(least, wanted * size // total) for label, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda label: -(wanted * sizes[label] % total))
    missing = wanted - sum(counts.values())
    for label in by_remainder[: max(missing, 0)]:
        counts[label] += 1
    counts[max(sizes, key=lambda label: sizes[label])] += min(missing, 0)  # pays for ``least``
    return counts


def draw(rows: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(text, label, split) rows in an order, and from a draw, that only the texts decide."""
    order = sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest())
    sizes = dict(sorted(collections.Counter(label for _, label in rows).items()))
    open_test = stratified_counts(sizes, NUM_TEST, least=MIN_TEST)
    open_train = stratified_counts(sizes, NUM_TRAIN, least=MIN_TEST)
    sample = []
    for text, label in order:
        for split, still_open in (("test", open_test), ("train", open_train)):
            if still_open[label]:
                still_open[label] -= 1
                sample.append((text, label, split))
                break
    return sample


def write_csv_gz(rows: list[tuple[str, str, str]], path: Path) -> None:
    """Write the rows as gzipped CSV whose bytes depend on the rows alone."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("text", "label", "split"))
    writer.writerows(rows)
    packed = gzip.compress(buffer.getvalue().encode(), compresslevel=9, mtime=0)
    path.write_bytes(packed)


def main() -> None:
    """Read the database, draw the sample, write it and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    package_data = Path(__file__).resolve().parent.parent / "src/dynlora_lab/data"
    parser.add_argument("--output", type=Path, default=package_data / "wordnet_glosses.csv.gz")
    args = parser.parse_args()
    if not args.database.is_file():
        parser.error(f"--database {args.database} does not exist; apt-get install wordnet-base.")
    rows = draw(labelled_definitions(args.database))
    write_csv_gz(rows, args.output)
    counts = collections.Counter(split for _, _, split in rows)
    size = args.output.stat().st_size
    print(f"{args.output}: {dict(counts)}, {size} bytes")


if __name__ == "__main__":
    main()
