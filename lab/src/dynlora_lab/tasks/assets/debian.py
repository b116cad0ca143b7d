"""Descriptions of Debian's packages, and how its translators put them, from apt's own index."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from dynlora_lab.tasks.assets.cache import AssetError
from dynlora_lab.tasks.assets.tables import write_split

Stanza = dict[str, str]

LANGUAGES = ("en", "it")
MIN_WORDS, MAX_WORDS = 25, 60  # of a description with something to sum up, for a small model


def build_synopses(_parts: Mapping[str, Path], destination: Path) -> None:
    """Columns document (the long description), summary (the line above it), package (of the source)."""
    index = fetch_index(destination.parent / "apt")
    write_split(synopses(index), destination, key="package")


def build_italian(_parts: Mapping[str, Path], destination: Path) -> None:
    """Columns source (an English line that says what a package is), target (the same in Italian)."""
    index = fetch_index(destination.parent / "apt")
    write_split(translations(index, "it"), destination, key="source")


def fetch_index(folder: Path) -> Path:
    """Let apt fetch its index with descriptions into a folder of its own; the system's stays as it is.

    Raises:
        AssetError: apt is not here, or fails.
    """
    apt = shutil.which("apt-get")
    if apt is None:
        raise AssetError("this asset comes from apt's index and apt-get is not here; use Debian.")
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::lists": f"{folder}/lists",
        "Dir::Cache": f"{folder}/cache",
        "Acquire::Languages": ",".join(LANGUAGES),
        "Acquire::GzipIndexes": "false",  # plain text files
        "APT::Sandbox::User": "root",
    }
    settings = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    done = subprocess.run(  # noqa: S603 (our own command)
        [apt, "-q", *settings, "update"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssetError(f"apt-get update failed: {last}. Retry.")
    return folder / "lists"


def synopses(index: Path) -> Iterator[dict[str, str]]:
    """One package of each source, whose description is of ``MIN_WORDS`` to ``MAX_WORDS`` words."""
    english = {d["Description-md5"]: d["Description-en"] for d in _stanzas(index, "Translation-en")}
    seen: set[str] = set()
    for package in _stanzas(index, "Packages"):
        source = package.get("Source", package["Package"]).split()[0]
        synopsis, _, text = english.get(package.get("Description-md5", ""), "").partition("\n")
        words = text.split()
        if source not in seen and MIN_WORDS <= len(words) <= MAX_WORDS:
            seen.add(source)
            yield {"document": " ".join(words), "summary": synopsis, "package": source}


def translations(index: Path, language: str) -> Iterator[dict[str, str]]:
    """First lines of descriptions in English and ``language``, each English line once."""
    english = {d["Description-md5"]: d["Description-en"] for d in _stanzas(index, "Translation-en")}
    seen: set[str] = set()
    for translated in _stanzas(index, f"Translation-{language}"):
        source = english.get(translated["Description-md5"], "").partition("\n")[0]
        target = translated[f"Description-{language}"].partition("\n")[0]
        if source and target and source not in seen and source != target:
            seen.add(source)
            yield {"source": source, "target": target}


def _stanzas(index: Path, ending: str) -> Iterator[Stanza]:
    """Paragraphs of the largest file of the index that ends so (the others hold updates).

    Raises:
        AssetError: there is none, because the package sources name no Debian archive.
    """
    files = sorted(index.glob(f"*_{ending}"), key=lambda file: file.stat().st_size)
    if not files:
        raise AssetError(f"apt's index holds no {ending}; name a Debian archive in apt's sources.")
    stanza: Stanza = {}
    field = ""
    for line in (*files[-1].read_text(encoding="utf8").splitlines(), ""):
        if not line and stanza:
            yield stanza
            stanza = {}
        elif line.startswith(" "):
            stanza[field] += "\n" + ("" if line == " ." else line[1:])
        elif line:
            field, _, value = line.partition(":")
            stanza[field] = value.strip()
