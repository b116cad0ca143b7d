"""Exact match of short answers, over all questions and by kind."""

from collections.abc import Sequence

from dynlora_lab.tasks.scoring.pairs import check_pairs
from dynlora_lab.tasks.scoring.squad import exact_match


def exact_matches(
    predictions: Sequence[str], references: Sequence[str], kinds: Sequence[str]
) -> dict[str, float]:
    """Percent of answers that are right after SQuAD's normalisation of case, punctuation and articles.

    Args:
        predictions: one answer for each reference.
        references: the right answers.
        kinds: kind of each question, "" for none; each kind adds ``exact_match_KIND``.

    Raises:
        ValueError: the first two have different lengths, or are empty.

    >>> exact_matches(["Two", "the cat"], ["two", "dog"], ["count", "what"])
    {'exact_match': 50.0, 'exact_match_count': 100.0, 'exact_match_what': 0.0}
    """
    check_pairs(predictions, references)
    right = [exact_match(p, [r]) for p, r in zip(predictions, references, strict=True)]
    scores = {"exact_match": 100 * sum(right) / len(right)}
    for kind in sorted(set(kinds) - {""}):
        of_kind = [hit for hit, k in zip(right, kinds, strict=True) if k == kind]
        scores[f"exact_match_{kind}"] = 100 * sum(of_kind) / len(of_kind)
    return scores
