"""Word error rate of transcripts, by jiwer, after Whisper's normalisation of text."""

from collections.abc import Sequence

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from dynlora_lab.tasks.scoring.pairs import check_pairs


def word_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Substituted, left out and added words of all texts / words of all references, in percent.

    Both sides are lower-cased and lose punctuation and whatever stands in brackets first
    (transformers' ``BasicTextNormalizer``, for any language). More than 100 is possible.

    Args:
        predictions: one transcript for each reference.
        references: what was said; not all empty after normalisation.

    Raises:
        ValueError: the two have different lengths, are empty, or no reference holds a word.

    >>> word_error_rate(["Please, hold the lion"], ["please hold the line!"])
    25.0
    """
    check_pairs(predictions, references)
    normalise = BasicTextNormalizer()
    heard, said = (
        [" ".join(normalise(text).split()) for text in texts] for texts in (predictions, references)
    )
    if not any(said):
        raise ValueError("no reference holds a word, so the word error rate has no denominator.")
    # jiwer refuses an empty reference, although words heard in silence are errors all the same
    spoken = [(h, s) for h, s in zip(heard, said, strict=True) if s]
    errors = jiwer.process_words([s for _, s in spoken], [h for h, _ in spoken])
    invented = sum(len(h.split()) for h, s in zip(heard, said, strict=True) if not s)
    wrong = errors.substitutions + errors.deletions + errors.insertions + invented
    return 100 * wrong / sum(len(s.split()) for s in said)
