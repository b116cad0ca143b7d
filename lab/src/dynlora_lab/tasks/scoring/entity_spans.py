"""Precision, recall and F1 of labelled spans (names, chunks), by seqeval."""

from collections.abc import Sequence

from seqeval.metrics import accuracy_score
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support


def span_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Micro averages over all spans, and the share of right tags, in [0, 1].

    A span counts as found if its type and both its ends are right (CoNLL's rule; ``B-``/``I-`` tags,
    where an ``I-`` that continues nothing begins a span).

    Args:
        predictions: sentences of tags such as "B-person".
        references: the same sentences with the gold tags.

    Raises:
        ValueError: a sentence has other than one predicted tag for each gold tag.

    >>> span_scores([["B-person", "O", "B-place"]], [["B-person", "O", "O"]])["precision"]
    0.5
    """
    if [len(tags) for tags in predictions] != [len(tags) for tags in references]:
        raise ValueError(
            "predictions and references differ in the number of sentences or of tags in one of "
            "them; give one tag for each word."
        )
    gold, found = [list(tags) for tags in references], [list(tags) for tags in predictions]
    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, found, average="micro", zero_division=0
    )
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "tag_accuracy": float(accuracy_score(gold, found)),
    }
