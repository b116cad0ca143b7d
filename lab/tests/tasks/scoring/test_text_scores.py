"""ROUGE, BLEU, word errors, entity spans and perplexity: small cases worked by hand."""

import math

import numpy as np
import pytest
import torch

from dynlora_lab.tasks.scoring.entity_spans import span_scores
from dynlora_lab.tasks.scoring.perplexity import perplexity, row_losses
from dynlora_lab.tasks.scoring.summaries import rouge_scores
from dynlora_lab.tasks.scoring.translations import translation_scores
from dynlora_lab.tasks.scoring.word_errors import word_error_rate


def test_rouge_is_the_mean_f_measure_in_percent():
    scores = rouge_scores(["the dog", "nothing alike"], ["the dog barked", "a b c"])
    assert scores["rouge1"] == pytest.approx(100 * (2 * 2 / (2 + 3)) / 2)
    assert scores["rouge2"] == pytest.approx(100 * (2 * 1 / (1 + 2)) / 2)


def test_rougelsum_reads_lines_as_sentences_and_rougel_does_not():
    scores = rouge_scores(["c d\na b"], ["a b\nc d"])
    assert scores["rougeLsum"] == pytest.approx(100.0)
    assert scores["rougeL"] == pytest.approx(50.0)


def test_bleu_and_chrf_are_of_the_corpus_and_know_case():
    same = translation_scores(
        ["A small house.", "It rains today."], ["A small house.", "It rains today."]
    )
    lower = translation_scores(
        ["a small house.", "it rains today."], ["A small house.", "It rains today."]
    )
    assert same == {"bleu": 100.0, "chrf": 100.0}
    assert max(lower.values()) < 100


@pytest.mark.parametrize("score", [rouge_scores, translation_scores, word_error_rate])
def test_predictions_come_in_pairs_with_references(score):
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])


def test_word_errors_are_summed_before_they_are_divided():
    # 1 substitution in 4 words and 0 in 1: 1/5, where the mean of the two rates would be 1/8
    assert word_error_rate(["one two three five", "yes"], ["one two three four", "Yes."]) == 20.0


def test_words_heard_in_silence_are_errors():
    assert word_error_rate(["hello", "uh"], ["hello", "[music]"]) == 100.0
    with pytest.raises(ValueError, match="no reference holds a word"):
        word_error_rate(["uh"], ["..."])


def test_an_entity_counts_only_with_type_and_both_ends_right():
    gold = [["B-person", "I-person", "O", "B-place"]]
    assert span_scores(gold, gold)["f1"] == 1.0
    short = span_scores([["B-person", "O", "O", "B-place"]], gold)
    assert (short["precision"], short["recall"], short["tag_accuracy"]) == (0.5, 0.5, 0.75)
    typed = span_scores([["B-place", "I-place", "O", "B-place"]], gold)
    assert typed["f1"] == 0.5


def test_no_span_found_scores_zero_without_a_warning():
    scores = span_scores([["O", "O"]], [["B-x", "O"]])
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0.0, 0.0, 0.0)


def test_sentences_of_other_length_are_refused():
    with pytest.raises(ValueError, match="one tag for each word"):
        span_scores([["O"]], [["O", "O"]])


def test_perplexity_of_uniform_guesses_is_the_size_of_the_vocabulary():
    labels = torch.randint(0, 7, (3, 5))
    scores = perplexity(row_losses(torch.zeros(3, 5, 7), labels).numpy())
    assert scores["perplexity"] == pytest.approx(7.0)
    assert scores["tokens"] == 12  # the first token of a row is predicted by nothing


def test_perplexity_weighs_tokens_not_rows_and_leaves_out_ignored_ones():
    logits = torch.randn(2, 6, 5)
    labels = torch.randint(0, 5, (2, 6))
    labels[0, 2:] = -100
    log_p = logits.double().log_softmax(-1)
    terms = [
        -log_p[row, t, labels[row, t + 1]].item()
        for row in range(2)
        for t in range(5)
        if labels[row, t + 1] != -100
    ]
    scores = perplexity(row_losses(logits, labels).numpy())
    assert scores["perplexity"] == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)
    assert scores["tokens"] == len(terms) == 6


def test_perplexity_of_no_token_is_refused():
    with pytest.raises(ValueError, match="no token of the evaluation set counts"):
        perplexity(np.zeros((2, 3)))
