"""Text to text on a tiny BART: XSum's and WMT's column layouts, beam search, and what is refused."""

import pytest
from transformers import BartConfig, BartForConditionalGeneration

from dynlora_lab.tasks.seq2seq import Options, read
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, save_model, splits_of, tiny_tokenizer

WORDS = ("cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant")
XSUM = [
    {"document": f"The {a} met the {b}. They talked.", "summary": f"A {a} met.", "id": str(i)}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
]
WMT = [{"translation": {"en": row["document"], "de": row["summary"]}} for row in XSUM]


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer([" ".join(row.values()) for row in XSUM])
    start = dict.fromkeys(("bos_token_id", "decoder_start_token_id"), tokenizer.cls_token_id)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id, forced_eos_token_id=tokenizer.sep_token_id, **start,
    )  # fmt: skip
    return save_model(tmp_path / "base", BartForConditionalGeneration(config), tokenizer)


@pytest.mark.parametrize(
    ("rows", "options", "metrics"),
    [
        (XSUM, {"max_source_length": 32, "prefix": "sum: "}, {"rouge1", "rouge2", "rougeL"}),
        (
            WMT,
            {"kind": "translation", "source": "translation.en", "target": "translation.de"},
            {"bleu", "chrf"},
        ),
    ],
)
def test_a_run_writes_with_beam_search_and_scores_texts(tmp_path, base, rows, options, metrics):
    record = run_rows(
        tmp_path,
        splits_of(rows),
        task="seq2seq",
        model=base,
        options={"max_target_length": 12, "num_beams": 2, **options},
        training={"num_train_epochs": 8},
    ).record
    assert {f"eval_{name}" for name in metrics} <= record["metrics"].keys()
    assert record["baselines"].keys() >= metrics
    assert record["metrics"]["eval_loss"] < 5.0


def test_modules_trained_whole_are_head_and_not_adapter(tmp_path, base):
    result = run_rows(
        tmp_path,
        splits_of(XSUM),
        task="seq2seq",
        model=base,
        options={"max_target_length": 8, "num_beams": 1, "train_fully": ["encoder_attn"]},
        training={"max_steps": 8},
    )
    assert all(".encoder_attn." not in name for name in result.record["ranks"])
    assert result.record["budget"]["head_parameters"] == 4 * (32 * 32 + 32)


def test_the_baseline_is_the_source_itself():
    copied = [{"document": "a b c", "summary": "a b c"}]
    assert read(Options(), splits_of(copied)).baselines["rougeL"] == pytest.approx(100.0)


def test_a_module_or_language_that_is_not_there_is_refused(tmp_path, base):
    def attempt(**options):
        run_rows(tmp_path, splits_of(XSUM), task="seq2seq", model=base, options=options)

    with pytest.raises(RecipeError, match="no module ends in 'crossattention'; try .*encoder_attn"):
        attempt(train_fully=["crossattention"])
    with pytest.raises(RecipeError, match="options.target_language 'xx_XX' is no token"):
        attempt(target_language="xx_XX")


def test_a_missing_language_of_a_translation_names_the_columns():
    with pytest.raises(RecipeError, match=r"'translation.fr' is missing in train.*translation.de"):
        read(Options(source="translation.fr", target="translation.de"), splits_of(WMT))
