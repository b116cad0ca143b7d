"""ROUGE of summaries, by the rouge-score package (the scorer behind the published XSum figures)."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from dynlora_lab.tasks.scoring.pairs import check_pairs

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures in percent, with Porter stemming.

    ``rougeL`` reads a text as one sentence, ``rougeLsum`` takes each line as a sentence.

    Args:
        predictions: one summary for each reference.
        references: the gold summaries.

    Raises:
        ValueError: the two have different lengths, or are empty.

    >>> scores = rouge_scores(["the cat sat"], ["the cats sat down"])
    >>> [round(scores[name], 1) for name in ("rouge1", "rouge2", "rougeL")]
    [85.7, 80.0, 85.7]
    """
    check_pairs(predictions, references)
    scorer = RougeScorer(list(NAMES), use_stemmer=True)
    rows = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in NAMES}
