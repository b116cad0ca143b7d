"""Extractive question answering on tiny local rows in SQuAD's own layout."""

import pytest
from transformers import BertConfig, BertForQuestionAnswering

from dynlora_lab.tasks.question_answering import Options, _windows, read
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, save_model, splits_of, tiny_tokenizer

THINGS = ("cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant")
FILLER = "It was a long and quiet day in the old house by the sea."


def row(number, answered=True):
    thing = THINGS[number % len(THINGS)]
    context = f"{FILLER} Then the {thing} came in. {FILLER}"
    answers = {"text": [thing], "answer_start": [context.index(f"the {thing} came") + len("the ")]}
    return {
        "id": str(number),
        "title": "Animals",
        "context": context,
        "question": "Who came in?" if answered else "Who sang a song?",
        "answers": answers if answered else {"text": [], "answer_start": []},
    }


ANSWERED = [row(number) for number in range(16)]
MIXED = ANSWERED + [row(number, answered=False) for number in range(16)]


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer([r["question"] + " " + r["context"] for r in MIXED])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return save_model(tmp_path / "base", BertForQuestionAnswering(config), tokenizer)


@pytest.mark.parametrize(("version", "rows"), [("v1", ANSWERED), ("v2", MIXED)])
def test_a_run_over_sliding_windows_reports_the_official_scores(tmp_path, base, version, rows):
    result = run_rows(
        tmp_path,
        splits_of(rows),
        task="question-answering",
        model=base,
        options={"version": version, "max_length": 24, "stride": 8},
    )
    metrics = result.record["metrics"]
    assert len(result.prepared.evals[""]) > len(rows)  # several windows a context
    official = {"v1": {"exact_match", "f1"}, "v2": {"exact", "HasAns_f1", "NoAns_f1", "best_f1"}}
    assert {f"eval_{name}" for name in official[version]} <= metrics.keys()
    assert 0 <= metrics["eval_f1"] <= 100


def test_always_no_answer_is_the_baseline():
    assert read(Options(version="v2"), splits_of(MIXED)).baselines == {"exact": 50.0, "f1": 50.0}
    assert read(Options(version="v1"), splits_of(ANSWERED)).baselines["f1"] == 0.0


def test_the_target_is_the_answer_in_its_window_and_the_null_token_elsewhere():
    tokenizer = tiny_tokenizer([r["question"] + " " + r["context"] for r in MIXED])
    data = read(Options(version="v2"), splits_of(MIXED))
    options = Options(version="v2", max_length=24, stride=8)
    rows, windows = _windows(data.train, options=options, tokenizer=tokenizer)
    hits = {}
    for item, window in zip(rows, windows, strict=True):
        context = MIXED[int(window.question)]["context"]
        first, last = item["start_positions"], item["end_positions"]
        if first:
            begin, end = window.offsets[first][0], window.offsets[last][1]
            hits.setdefault(window.question, set()).add(context[begin:end])
    answered = {str(number): {THINGS[number % len(THINGS)]} for number in range(len(ANSWERED))}
    assert hits == answered  # none for the questions without an answer


def test_gold_start_and_end_give_full_marks(base):
    """The whole way back: targets as logits, through windows and spans to the scores."""
    import numpy as np
    from transformers import AutoTokenizer, EvalPrediction

    from dynlora_lab.tasks.question_answering import _measured

    options = Options(version="v2", max_length=24, stride=8)
    data = read(options, splits_of(MIXED))
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows, windows = _windows(data.evals[""], options=options, tokenizer=tokenizer)
    width = max(len(window.offsets) for window in windows)
    start, end = (
        np.eye(width)[rows[name][:]] * 10 for name in ("start_positions", "end_positions")
    )
    prediction = EvalPrediction(predictions=(start, end), label_ids=None)
    scores = _measured(options, {"": (data.evals[""], windows)}, "", prediction)
    assert scores["exact"] == scores["f1"] == 100.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": [], "answer_start": []}}, "has no answer; drop it"),
        ({"answers": {"text": ["cat"], "answer_start": [0]}}, "does not stand at character 0"),
    ],
)
def test_unfit_answers_are_refused_with_their_row(change, message):
    with pytest.raises(RecipeError, match=f"row 1 of train.*{message}"):
        read(Options(), splits_of([ANSWERED[0], {**ANSWERED[0], **change}], ANSWERED))


def test_missing_columns_and_other_layouts_are_refused():
    with pytest.raises(RecipeError, match=r"'passage' is missing in train.*options.context"):
        read(Options(context="passage"), splits_of(ANSWERED))
    flat = [{**r, "answers": r["answers"]["text"][0]} for r in ANSWERED]
    with pytest.raises(RecipeError, match=r"has 'cat' in 'answers'; give \{text"):
        read(Options(), splits_of(flat))
    with pytest.raises(ValueError, match="stride=24 must lie in"):
        Options(max_length=24, stride=24)
