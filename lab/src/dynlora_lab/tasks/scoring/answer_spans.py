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

    n_best: int = 20  # candidates kept for a question
    max_answer_tokens: int = 30
    allow_no_answer: bool = False  # SQuAD v2
    null_threshold: float = 0.0  # "no answer" if its score leads the best span's by more than this


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One answer; ``score`` is start logit + end logit, ``probability`` its softmax over n-best."""

    text: str
    score: float
    probability: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The choice for one question; ``text`` is "" where there is no answer."""

    text: str
    null_lead: float  # score of "no answer" minus that of the best span
    n_best: tuple[Candidate, ...]  # best first; with "no answer" where it is allowed


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
    and ends. The same characters found in two windows count once, with the higher score. "No answer"
    scores start[null] + end[null] of the window where that is lowest: a question has none only if
    no window holds one.

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
    spans: dict[str, dict[tuple[int, int], float]] = {question: {} for question in contexts}
    null_scores = dict.fromkeys(contexts, math.inf)
    for start, end, window in zip(start_logits, end_logits, windows, strict=True):
        found = spans[window.question]
        for span, score in _window_spans(start, end, window, settings):
            found[span] = max(score, found.get(span, -math.inf))
        null = float(start[window.null_token] + end[window.null_token])
        null_scores[window.question] = min(null, null_scores[window.question])
    return {
        question: _answer(found, null_scores[question], contexts[question], settings)
        for question, found in spans.items()
    }


def _window_spans(
    start: Logits, end: Logits, window: Window, settings: SpanSettings
) -> list[tuple[tuple[int, int], float]]:
    """The n best spans of one window as ((first character, end character), score)."""
    tokens = len(window.offsets)
    inside = np.array([offset is not None for offset in window.offsets], dtype=bool)
    starts = np.where(inside, start[:tokens], -np.inf).astype(np.float64)
    ends = np.where(inside, end[:tokens], -np.inf).astype(np.float64)
    longest = min(settings.max_answer_tokens, tokens)
    scores = np.full((longest, tokens), -np.inf)  # [extra tokens, first token]
    for extra in range(longest):
        scores[extra, : tokens - extra] = starts[: tokens - extra] + ends[extra:]
    best = np.argsort(-scores, axis=None, kind="stable")[: settings.n_best]
    found = []
    for extra, first in zip(*np.unravel_index(best, scores.shape), strict=True):
        if np.isfinite(scores[extra, first]):
            begin, stop = window.offsets[first], window.offsets[first + extra]
            if begin is not None and stop is not None:
                found.append(((begin[0], stop[1]), float(scores[extra, first])))
    return found


def _answer(
    spans: Mapping[tuple[int, int], float], null_score: float, context: str, settings: SpanSettings
) -> Answer:
    candidates = [
        Candidate(text=context[first:stop], score=score) for (first, stop), score in spans.items()
    ]
    candidates = sorted(candidates, key=lambda c: -c.score)[: settings.n_best]
    null_lead = null_score - candidates[0].score if candidates else math.inf
    answered = bool(candidates) and not (
        settings.allow_no_answer and null_lead > settings.null_threshold
    )
    text = candidates[0].text if answered else ""
    if settings.allow_no_answer and math.isfinite(null_score):
        candidates.append(Candidate(text="", score=null_score))
        candidates.sort(key=lambda c: -c.score)
    return Answer(text=text, null_lead=null_lead, n_best=_with_probabilities(candidates))


def _with_probabilities(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    weights = [math.exp(c.score - candidates[0].score) for c in candidates]
    return tuple(
        Candidate(text=c.text, score=c.score, probability=weight / sum(weights))
        for c, weight in zip(candidates, weights, strict=True)
    )
