"""Bibles out of SWORD modules of a handful of verses, compared by value."""

import struct
import zlib

import pytest
from pysword.bible import ZTextModule
from pysword.canons import canons

from dynlora_lab.tasks.assets import scripture
from dynlora_lab.tasks.assets.cache import AssetError
from test_asset_builders import built, rows_of, write_files


def split_of(rows, key):
    return {split: [row[key] for row in of_split] for split, of_split in rows.items()}


OLD = {
    ("Gen", 1, 1): '<w lemma="x">In</w> the beginning<note>or, start</note>.',
    ("Gen", 1, 2): "And the earth .",
    ("Gen", 2, 1): "Thus the heavens",
    ("Ruth", 1, 1): "Now it came to pass",
    ("Ruth", 1, 2): "only here",
    ("3John", 1, 1): "The elder",
    ("Jude", 1, 25): "So be it",
}
NEW = {
    ("Gen", 1, 1): "First",
    ("Gen", 1, 2): '<title type="x">Day one</title><l sID="1"/>The earth',
    ("Gen", 1, 3): "<note>nothing but a note</note>",
    ("Gen", 2, 1): "The heavens",
    ("Ruth", 1, 1): "Long ago",
    ("3John", 1, 1): "An old man",
    ("Jude", 1, 25): "Amen",
}


def sword_module(name, verses):
    """Files of a SWORD module (zText: one compressed block a book) in the King James order."""
    data = f"modules/texts/ztext/{name.lower()}"
    conf = f"[{name}]\nDataPath=./{data}/\nModDrv=zText\nEncoding=UTF-8\nSourceType=OSIS\n"
    files = {f"mods.d/{name.lower()}.conf": conf}
    for testament in ("ot", "nt"):
        records, blocks, packed = [(0, 0, 0)] * 2, [], b""  # module's and testament's heading
        for _, book, _, lengths in canons["kjv"][testament]:
            block = b""
            records.append((0, 0, 0))
            for chapter, length in enumerate(lengths, start=1):
                records.append((0, 0, 0))
                for verse in range(1, length + 1):
                    text = verses.get((book, chapter, verse), "").encode()
                    records.append((len(blocks), len(block), len(text)))
                    block += text
            compressed = zlib.compress(block)
            blocks.append((len(packed), len(compressed), len(block)))
            packed += compressed
        files[f"{data}/{testament}.bzv"] = b"".join(struct.pack("<IIH", *r) for r in records)
        files[f"{data}/{testament}.bzs"] = b"".join(struct.pack("<III", *b) for b in blocks)
        files[f"{data}/{testament}.bzz"] = packed
    return {f"usr/share/sword/{path}": content for path, content in files.items()}


BIBLES = {
    "sword-text-kjv": sword_module("engKJV2006eb", OLD),
    "sword-text-web": sword_module("engWEB2015eb", NEW),
    "sword-text-sparv": sword_module("spaRV1909eb", {**OLD, ("Gen", 1, 1): "EN el principio"}),
}


def bibles(name, folder):
    packages = {"verse-translation": ("web", "sparv"), "spanish-bible": ("sparv",)}
    names = [f"sword-text-{short}" for short in packages.get(name, ("kjv", "web"))]
    return rows_of(built(name, folder, {name: BIBLES[name] for name in names}))


def test_verses_are_read_by_book_chapter_and_number_in_order_and_empty_ones_left_out(tmp_path):
    write_files(tmp_path, BIBLES["sword-text-web"])
    verses = scripture.read_verses({"sword-text-web": tmp_path}, "sword-text-web")
    assert list(verses.items()) == [
        (("Gen", 1, 1), "First"),
        (("Gen", 1, 2), "The earth"),
        (("Gen", 2, 1), "The heavens"),
        (("Ruth", 1, 1), "Long ago"),
        (("3John", 1, 1), "An old man"),
        (("Jude", 1, 25), "Amen"),
    ]


def test_each_book_is_decompressed_once(tmp_path, monkeypatch):
    blocks = []
    decompress = ZTextModule._decompress
    monkeypatch.setattr(
        ZTextModule, "_decompress", lambda self, data: blocks.append(data) or decompress(self, data)
    )
    write_files(tmp_path, BIBLES["sword-text-web"])
    scripture.read_verses({"sword-text-web": tmp_path}, "sword-text-web")
    assert len(blocks) == 66


def test_rewriting_pairs_the_verses_that_both_have_and_holds_out_whole_books(tmp_path):
    assert bibles("verse-rewriting", tmp_path) == {
        "train": [
            {"source": "In the beginning.", "target": "First"},
            {"source": "And the earth.", "target": "The earth"},
            {"source": "Thus the heavens", "target": "The heavens"},
            {"source": "So be it", "target": "Amen"},
        ],
        "validation": [
            {"source": "Now it came to pass", "target": "Long ago"},
            {"source": "The elder", "target": "An old man"},
        ],
    }


def test_translation_is_from_english_to_spanish(tmp_path):
    rows = bibles("verse-translation", tmp_path)
    assert rows["train"][0] == {"source": "First", "target": "EN el principio"}
    assert split_of(rows, "source") == {
        "train": ["First", "The earth", "The heavens", "Amen"],
        "validation": ["Long ago", "An old man"],
    }


def test_every_second_verse_is_paired_with_the_next_one_and_the_last_with_the_first(tmp_path):
    def row(a, b, label):
        return {"text_a": a, "text_b": b, "label": label}

    assert bibles("verse-paraphrase", tmp_path) == {
        "train": [
            row("In the beginning.", "First", "same"),
            row("And the earth.", "The heavens", "different"),
            row("Thus the heavens", "The heavens", "same"),
            row("So be it", "First", "different"),
        ],
        "validation": [
            row("Now it came to pass", "An old man", "different"),
            row("The elder", "An old man", "same"),
        ],
    }


def test_plain_bibles_are_chapters_with_whole_books_held_out(tmp_path):
    assert split_of(bibles("spanish-bible", tmp_path), "text") == {
        "train": ["EN el principio And the earth.", "Thus the heavens", "So be it"],
        "validation": ["Now it came to pass only here", "The elder"],
    }


def test_a_bible_without_its_module_or_its_texts_is_refused(tmp_path):
    with pytest.raises(KeyError, match="spaRV1909eb"):
        built("spanish-bible", tmp_path, {"sword-text-sparv": BIBLES["sword-text-kjv"]})
    conf = "usr/share/sword/mods.d/sparv1909eb.conf"
    only_conf = {conf: BIBLES["sword-text-sparv"][conf]}
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="Could not open OT or NT"):
        built("spanish-bible", empty, {"sword-text-sparv": only_conf})


def test_a_bible_whose_texts_are_damaged_is_refused(tmp_path):
    damaged = {
        path: b"\0" * len(content) if path.endswith("bzz") else content
        for path, content in BIBLES["sword-text-sparv"].items()
    }
    with pytest.raises(AssetError, match=r"nothing to write to train\.parquet"):
        built("spanish-bible", tmp_path, {"sword-text-sparv": damaged})
