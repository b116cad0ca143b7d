"""Choosing an answer over windows, against a slow search through all spans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynlora_lab.tasks.scoring.answer_spans import SpanSettings, Window, best_answers

CONTEXT = "ab cd ef gh ij kl"
WORDS = [(3 * i, 3 * i + 2) for i in range(6)]
FIRST = Window(question="q", offsets=[None, None, *WORDS[:4]])  # null token, question, 4 words
SECOND = Window(question="q", offsets=[None, None, *WORDS[2:]])  # two words in both windows


def answer(start, end, *, windows=(FIRST,), contexts=None, **options):
    return best_answers(
        np.asarray(start, dtype=np.float32),
        np.asarray(end, dtype=np.float32),
        windows=windows,
        contexts=contexts or {"q": CONTEXT},
        settings=SpanSettings(**options),
    )["q"]


def test_the_best_span_may_lie_in_any_window():
    start = [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 3, 0]]
    end = [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 3]]
    assert answer(start, end, windows=(FIRST, SECOND)).text == "ij kl"
    assert answer(start[::-1], end[::-1], windows=(SECOND, FIRST)).text == "ij kl"


def test_a_span_lies_in_the_context_runs_forward_and_is_not_too_long():
    start, end = [[9, 9, 5, 0, 0, 1]], [[9, 9, 1, 0, 0, 5]]
    assert answer(start, end).text == "ab cd ef gh"
    assert answer(start, end, max_answer_tokens=3).text in {"ab", "gh"}
    assert answer([[0, 0, 0, 0, 0, 5]], [[0, 0, 5, 0, 0, 0]]).text != ""


def test_a_span_in_two_windows_has_the_higher_score():
    start = [[0, 0, -9, -9, 4, -9], [0, 0, 7, -9, -9, -9]]  # "ef" is token 4 of one, 2 of the other
    found = answer(start, start, windows=(FIRST, SECOND))
    assert (found.text, found.score) == ("ef", 14.0)


def test_no_answer_needs_every_window_and_a_lead_above_the_threshold():
    start = [[5, 0, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    both = (FIRST, SECOND)
    refused = answer(start, start, windows=both, allow_no_answer=True)
    assert refused.null_lead == 2.0  # 2 + 2 from the window with the lower one, less 1 + 1
    assert refused.text == ""
    assert answer(start, start, windows=both, allow_no_answer=True, null_threshold=2.0).text == "ab"
    assert answer(start, start, windows=both, allow_no_answer=False).text == "ab"


def test_a_question_whose_windows_hold_no_context_gets_no_answer():
    empty = Window(question="q", offsets=[None, None])
    assert answer([[1, 1]], [[1, 1]], windows=(empty,)).text == ""


def test_padding_beyond_a_window_is_never_chosen():
    start = [[0, 0, 1, 0, 0, 0, 99, 99]]
    assert answer(start, start).text == "ab"


def test_rows_and_windows_have_to_match():
    with pytest.raises(ValueError, match=r"2 rows of start logits and 1 of end logits for 1"):
        answer([[0] * 6] * 2, [[0] * 6])


logits = arrays(np.float32, (2, 6), elements=st.integers(-20, 20).map(float))


@settings(max_examples=60)
@given(logits, logits, st.integers(1, 4))
def test_the_choice_equals_a_search_through_all_spans(start, end, longest):
    best = max(
        float(s[i]) + float(e[j])
        for s, e in zip(start, end, strict=True)
        for i in range(2, 6)
        for j in range(i, min(i + longest, 6))
    )
    found = answer(start, end, windows=(FIRST, SECOND), max_answer_tokens=longest)
    assert found.score == best
