"""Three public-domain Bibles of Debian's SWORD packages: paraphrase, translation and plain text."""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynlora_lab.tasks.assets.tables import write_parts

Parts = Mapping[str, Path]
Verse = tuple[str, int, int]  # book (OSIS name), chapter, verse

MODULES = {
    "sword-text-kjv": "engKJV2006eb",
    "sword-text-web": "engWEB2015eb",
    "sword-text-sparv": "spaRV1909eb",
}
# Whole books are held out: verses of one book repeat each other's phrases.
HELD_OUT_BOOKS = ("Ruth", "Esth", "Joel", "Jonah", "Mal", "Mark", "Gal", "Phil", "Jas", "3John")

_NOTE = re.compile(r"<(note|title)\b[^>]*>.*?</\1>", re.DOTALL)
_LINE = re.compile(r"<(?:l|lg|div|p|lb)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_BEFORE_PUNCTUATION = re.compile(r"\s+([,.;:!?])")


def build_verse_rewriting(parts: Parts, destination: Path) -> None:
    """The same verse in two translations: columns source (King James), target (World English)."""
    _write_pairs(parts, destination, "sword-text-kjv", "sword-text-web")


def build_verse_translation(parts: Parts, destination: Path) -> None:
    """English and Spanish of 1909: columns source (World English), target (Reina-Valera)."""
    _write_pairs(parts, destination, "sword-text-web", "sword-text-sparv")


def build_verse_paraphrase(parts: Parts, destination: Path) -> None:
    """Columns text_a (King James), text_b (World English), label: the same verse, or the next one.

    Every second verse is paired with a neighbour, so the two labels are equally frequent and telling
    them apart needs more than the topic.
    """
    old, new = (read_verses(parts, name) for name in ("sword-text-kjv", "sword-text-web"))
    both = [verse for verse in old if verse in new]
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for index, verse in enumerate(both):
        other = both[(index + 1) % len(both)] if index % 2 else verse
        row = {
            "text_a": old[verse],
            "text_b": new[other],
            "label": "different" if index % 2 else "same",
        }
        rows[_split(verse)].append(row)
    write_parts(rows, destination)


def build_spanish_bible(parts: Parts, destination: Path) -> None:
    """Chapters of the Reina-Valera of 1909: column text."""
    _write_chapters(read_verses(parts, "sword-text-sparv"), destination)


def read_verses(parts: Parts, package: str) -> dict[Verse, str]:
    """Verses in the order of the book, without notes, headings and markup; empty ones left out."""
    from pysword.modules import SwordModules  # an optional package: only who builds this needs it

    modules = SwordModules(str(parts[package] / "usr" / "share" / "sword"))
    modules.parse_modules()
    bible = modules.get_bible_from_module(MODULES[package])
    # pysword 0.2.8 unpacks the whole book again for every verse: two minutes where this takes one second
    bible._decompressed_text = functools.lru_cache(maxsize=2)(bible._decompressed_text)
    return {verse: text for verse, raw in _raw_verses(bible) if (text := plain_text(raw))}


def plain_text(markup: str) -> str:
    """The words of a verse in OSIS markup.

    >>> plain_text('<w lemma="x">God</w><note>a<b/></note><w>made</w> <l eID="1"/>it<note/> .')
    'God made it.'
    """
    lines = _LINE.sub(" ", _NOTE.sub(" ", markup))
    return _BEFORE_PUNCTUATION.sub(r"\1", " ".join(_TAG.sub("", lines).split()))


def _raw_verses(bible: Any) -> Iterator[tuple[Verse, str]]:
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter in range(1, book.num_chapters + 1):
                verses = bible.get_iter(books=[book.name], chapters=[chapter], clean=False)
                for number, raw in enumerate(verses, start=1):
                    yield (book.osis_name, chapter, number), raw


def _write_pairs(parts: Parts, destination: Path, source: str, target: str) -> None:
    before, after = read_verses(parts, source), read_verses(parts, target)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for verse, text in before.items():
        if verse in after:
            rows[_split(verse)].append({"source": text, "target": after[verse]})
    write_parts(rows, destination)


def _write_chapters(verses: Mapping[Verse, str], destination: Path) -> None:
    chapters: dict[tuple[str, int], list[str]] = {}
    for (book, chapter, _), text in verses.items():
        chapters.setdefault((book, chapter), []).append(text)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for (book, _), texts in chapters.items():
        rows["validation" if book in HELD_OUT_BOOKS else "train"].append({"text": " ".join(texts)})
    write_parts(rows, destination)


def _split(verse: Verse) -> str:
    return "validation" if verse[0] in HELD_OUT_BOOKS else "train"
