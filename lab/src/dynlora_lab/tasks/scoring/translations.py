"""BLEU and chrF of translations, by sacreBLEU."""

from collections.abc import Sequence

import sacrebleu

from dynlora_lab.tasks.scoring.pairs import check_pairs


def translation_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and corpus chrF2, both in percent, with sacreBLEU's defaults.

    These are BLEU of detokenised text (13a tokeniser, exponential smoothing, case counts) and chrF with
    character 6-grams and beta 2: the settings that papers mean by "sacreBLEU" and "chrF".

    Args:
        predictions: one translation for each reference.
        references: the gold translations, one each.

    Raises:
        ValueError: the two have different lengths, or are empty.

    >>> translation_scores(["El gato duerme en casa."], ["El gato duerme en casa."])
    {'bleu': 100.0, 'chrf': 100.0}
    """
    check_pairs(predictions, references)
    bleu = sacrebleu.corpus_bleu(list(predictions), [list(references)])
    chrf = sacrebleu.corpus_chrf(list(predictions), [list(references)])
    return {"bleu": round(float(bleu.score), 10), "chrf": round(float(chrf.score), 10)}
