"""From start and end logits of overlapping windows to one answer for each question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Window:
    """One model input: a part of the context of one question.

    ``offsets`` has an entry for every token: where it begins and ends in the context, in characters,
    or None outside the context (question, special tokens, padding). ``null_token`` is the token that
    stands for "no answer", the classification token.
    """

    question: str
    offsets: Sequence[tuple[int, int] | None]
    null_token: int = 0


@dataclass(frozen=True, kw_only=True)
class SpanSettings:
    """How answers are chosen; defaults are the customary ones."""

    max_answer_tokens: int = 30
    allow_no_answer: bool = False  # SQuAD v2
    null_threshold: float = 0.0  # "no answer" if its score leads the best span's by more than this


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The choice for one question; ``text`` is "" where there is no answer."""

    text: str
    score: float  # of the best span: start logit + end logit; -inf where there is none
    null_lead: float  # score of "no answer" minus that of the best span


def best_answers(
    start_logits: Logits,
    end_logits: Logits,
    *,
    windows: Sequence[Window],
    contexts: Mapping[str, str],
    settings: SpanSettings,
) -> dict[str, Answer]:
    """The best span over all windows of each question.

    A span (i, j) of a window scores start[i] + end[j]; it lies inside the context, i <= j, and has at
    most ``max_answer_tokens`` tokens. All such spans compete, not only those among the n best starts
    and ends. "No answer" scores start[null] + end[null] of the window where that is lowest: a question
    has none only if no window holds one.

    Args:
        start_logits: (windows, tokens); entries beyond a window's tokens are padding.
        end_logits: likewise.
        windows: one for each row, in any order.
        contexts: question id -> context.
        settings: see :class:`SpanSettings`.

    Raises:
        ValueError: the number of rows and of windows differ.
    """
    if not len(windows) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"{len(start_logits)} rows of start logits and {len(end_logits)} of end logits for "
            f"{len(windows)} windows; give one row for each window."
        )
    best = dict.fromkeys(contexts, (-math.inf, ""))
    null_scores = dict.fromkeys(contexts, math.inf)
    for start, end, window in zip(start_logits, end_logits, windows, strict=True):
        question = window.question
        score, (first, stop) = _best_span(start, end, window, settings)
        if score > best[question][0]:
            best[question] = (score, contexts[question][first:stop])
        null = float(start[window.null_token] + end[window.null_token])
        null_scores[question] = min(null, null_scores[question])
    return {
        question: _answer(*best[question], null_scores[question], settings) for question in contexts
    }


def _best_span(
    start: Logits, end: Logits, window: Window, settings: SpanSettings
) -> tuple[float, tuple[int, int]]:
    """Score of the best span of one window, -inf without any, and its first and last character."""
    tokens = len(window.offsets)
    inside = np.array([offset is not None for offset in window.offsets], dtype=bool)
    starts = np.where(inside, start[:tokens], -np.inf).astype(np.float64)
    ends = np.where(inside, end[:tokens], -np.inf).astype(np.float64)
    spans = starts[:, None] + ends  # [first token, last token]
    first, last = np.indices(spans.shape)
    spans[(last < first) | (last - first >= settings.max_answer_tokens)] = -np.inf
    i, j = map(int, np.unravel_index(spans.argmax(), spans.shape))
    begin, stop = window.offsets[i], window.offsets[j]
    if begin is None or stop is None:  # no token of the context in this window
        return -math.inf, (0, 0)
    return float(spans[i, j]), (begin[0], stop[1])


def _answer(score: float, text: str, null_score: float, settings: SpanSettings) -> Answer:
    null_lead = null_score - score
    is_none = settings.allow_no_answer and null_lead > settings.null_threshold
    return Answer(text="" if is_none else text, score=score, null_lead=null_lead)
