"""The official SQuAD scores on the cases where home-made versions go wrong, worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlora_lab.tasks.scoring.squad import exact_match, normalised, squad_scores, token_f1

answers = st.text(alphabet="ab the.,-“", max_size=12)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Beatles", "beatles"),  # articles
        ("U.S.", "us"),  # punctuation goes, nothing comes in its place
        ("state-of-the-art", "stateoftheart"),  # ... so this "the" is no article any more
        ("an  a\tthe", ""),
        ("Anthem, theory", "anthem theory"),  # an article is a whole word
        ("“quoted”", "“quoted”"),  # only ASCII punctuation
        ("Zoë's", "zoës"),
    ],
)
def test_answers_are_normalised_in_the_official_order(answer, expected):
    assert normalised(answer) == expected


def test_the_best_of_several_gold_answers_counts():
    golds = ["Saint Bernadette Soubirous", "Bernadette"]
    assert exact_match("bernadette.", golds) == 1.0
    assert token_f1("Saint Bernadette", golds) == pytest.approx(2 * 2 / (2 + 3))


def test_words_count_as_often_as_they_occur_on_both_sides():
    assert token_f1("new york new york", ["new york"]) == pytest.approx(2 * 2 / (4 + 2))


def test_the_two_scripts_differ_where_an_answer_normalises_to_nothing():
    predictions, golds = {"q": "the"}, {"q": ["a"]}
    assert squad_scores(predictions, golds, version="v1") == {"exact_match": 100.0, "f1": 0.0}
    v2 = squad_scores(predictions, golds, version="v2")
    assert (v2["exact"], v2["f1"]) == (100.0, 100.0)
    assert "HasAns_f1" not in v2  # such a gold answer is none


def test_v2_scores_questions_with_and_without_an_answer_apart():
    predictions = {"a": "Paris", "b": "", "c": "Rome", "d": ""}
    golds = {"a": ["Paris"], "b": ["Oslo"], "c": [], "d": []}
    scores = squad_scores(predictions, golds, version="v2")
    assert scores == {
        "exact": 50.0, "f1": 50.0,
        "HasAns_exact": 50.0, "HasAns_f1": 50.0, "NoAns_exact": 50.0, "NoAns_f1": 50.0,
    }  # fmt: skip


def test_best_threshold_is_found_among_the_scores():
    predictions = {"a": "Paris", "c": "Rome", "b": "Oslo", "d": "Bonn"}
    golds = {"a": ["Paris"], "b": ["Oslo"], "c": [], "d": []}
    likely_none = {"a": -3.0, "b": -1.0, "c": 0.5, "d": 2.0}
    scores = squad_scores(predictions, golds, version="v2", no_answer_scores=likely_none)
    assert scores["exact"] == 50.0
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (100.0, -1.0)
    # nothing beats "no answer" everywhere if the questions without one come first
    reverse = {question: -score for question, score in likely_none.items()}
    scores = squad_scores(predictions, golds, version="v2", no_answer_scores=reverse)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (50.0, 0.0)


def test_a_question_without_prediction_is_refused():
    with pytest.raises(ValueError, match=r"lack 1 of 2 questions, the first is 'b'"):
        squad_scores({"a": "x"}, {"a": ["x"], "b": ["y"]}, version="v1")


def test_v1_refuses_a_question_without_gold_answer():
    with pytest.raises(ValueError, match="'a' has no gold answer.*version='v2'"):
        squad_scores({"a": "x"}, {"a": []}, version="v1")


@given(answers, st.lists(answers, min_size=1, max_size=3))
def test_f1_is_a_share_and_one_at_an_exact_match(prediction, golds):
    f1 = token_f1(prediction, golds)
    assert 0.0 <= f1 <= 1.0
    if exact_match(prediction, golds):
        assert math.isclose(f1, 1.0)
