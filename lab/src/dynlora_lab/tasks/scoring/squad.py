"""Exact match and F1 of extractive question answering, as the official SQuAD scripts define them."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Version = Literal["v1", "v2"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalised(answer: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces.

    >>> normalised("The  Eiffel-Tower!")
    'eiffeltower'
    >>> normalised("a theatre")
    'theatre'
    """
    return " ".join(_ARTICLE.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the gold answers after normalisation, else 0.0.

    >>> exact_match("the Broncos", ["Denver Broncos", "Broncos"])
    1.0
    """
    return float(normalised(prediction) in {normalised(gold) for gold in golds})


def token_f1(prediction: str, golds: Sequence[str], *, version: Version = "v2") -> float:
    """Best F1 over the gold answers, between the two bags of words after normalisation.

    The scripts differ in one case, answers that are empty after normalisation ("", "the"): v1 gives
    0 to whatever shares no word, v2 gives 1 if both are empty.

    >>> round(token_f1("the Denver Broncos", ["Broncos", "Carolina"]), 3)
    0.667
    >>> token_f1("", [""], version="v1"), token_f1("", [""], version="v2")
    (0.0, 1.0)
    """
    return max(_f1(normalised(prediction).split(), normalised(g).split(), version) for g in golds)


def squad_scores(
    predictions: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    *,
    version: Version,
    no_answer_scores: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Scores in percent over all questions, with the names of the official scripts.

    v1: ``exact_match`` and ``f1``. v2: ``exact`` and ``f1``, both again over the questions with and
    without an answer (``HasAns_…``, ``NoAns_…``, where there are any), and, if ``no_answer_scores``
    are given, the best that a threshold on them could reach and that threshold
    (``best_exact``, ``best_exact_thresh``, ``best_f1``, ``best_f1_thresh``).

    Args:
        predictions: question id -> answer; "" means that the question has none.
        golds: question id -> gold answers; empty means that the question has none (v2 only).
        version: which script.
        no_answer_scores: question id -> a number that grows as "no answer" gets likelier.

    Raises:
        ValueError: a question has no prediction, or in v1 no gold answer.
    """
    missing = sorted(golds.keys() - predictions.keys())
    if missing:
        raise ValueError(
            f"predictions lack {len(missing)} of {len(golds)} questions, the first is "
            f"{missing[0]!r}; give every question an answer, '' for none."
        )
    targets = {q: _targets(q, answers, version) for q, answers in golds.items()}
    exact = {q: exact_match(predictions[q], targets[q]) for q in targets}
    f1 = {q: token_f1(predictions[q], targets[q], version=version) for q in targets}
    if version == "v1":
        return {"exact_match": _percent(exact.values()), "f1": _percent(f1.values())}
    scores = {"exact": _percent(exact.values()), "f1": _percent(f1.values())}
    answerable = {q for q, answers in targets.items() if list(answers) != [""]}
    for name, chosen in (("HasAns", answerable), ("NoAns", targets.keys() - answerable)):
        if chosen:
            scores[f"{name}_exact"] = _percent(exact[q] for q in chosen)
            scores[f"{name}_f1"] = _percent(f1[q] for q in chosen)
    if no_answer_scores is not None:
        for name, values in (("exact", exact), ("f1", f1)):
            best, threshold = _best_threshold(values, predictions, no_answer_scores, answerable)
            scores[f"best_{name}"], scores[f"best_{name}_thresh"] = best, threshold
    return scores


def _targets(question: str, answers: Sequence[str], version: Version) -> Sequence[str]:
    """Gold answers to compare with; in v2 those that normalise to nothing do not count."""
    if version == "v2":
        return [answer for answer in answers if normalised(answer)] or [""]
    if not answers:
        raise ValueError(
            f"question {question!r} has no gold answer, and SQuAD v1 has no such questions; "
            "drop it or score with version='v2'."
        )
    return answers


def _f1(predicted: Sequence[str], gold: Sequence[str], version: Version) -> float:
    if version == "v2" and not (predicted and gold):
        return float(predicted == gold)
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    no_answer_scores: Mapping[str, float],
    answerable: set[str],
) -> tuple[float, float]:
    """Best percentage if every question above a threshold got "no answer", and that threshold.

    Questions are given their own answer one by one, the likeliest to have one first; the first best
    cut counts, and 0 stands for answering none of them, as in the official script.
    """
    current = float(len(scores) - len(answerable))
    best, threshold = current, 0.0
    for question in sorted(scores, key=no_answer_scores.__getitem__):
        if question in answerable:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, threshold = current, no_answer_scores[question]
    return 100 * best / len(scores), threshold


def _percent(values: Iterable[float]) -> float:
    numbers = list(values)
    return 100 * sum(numbers) / len(numbers)
