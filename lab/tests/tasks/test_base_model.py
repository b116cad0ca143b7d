"""Which modules of a model count as its head where no weights are read."""

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    MT5Config,
    T5Config,
    T5ForConditionalGeneration,
)

from dynlora_lab.tasks.base_model import BaseModel, BaseOptions, outside_the_trunk
from dynlora_lab.tasks.plan import plan
from dynlora_lab.tasks.recipe import recipe_from
from tiny_recipes import save_model, splits_of, tiny_tokenizer

ROWS = [{"document": "The cat met the dog.", "summary": "A cat met."}] * 8
SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 64}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    tokenizer = tiny_tokenizer([" ".join(row.values()) for row in ROWS], eos_token="[SEP]")  # noqa: S106
    config = T5Config(
        **{**SIZES, "vocab_size": len(tokenizer)}, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5")
    return save_model(folder, T5ForConditionalGeneration(config), tokenizer)


@pytest.mark.parametrize(
    ("config", "auto_class", "head"),
    [
        (T5Config(**SIZES), AutoModelForSeq2SeqLM, []),
        (MT5Config(**SIZES, tie_word_embeddings=False), AutoModelForSeq2SeqLM, []),
        (T5Config(**SIZES), AutoModelForQuestionAnswering, ["qa_outputs"]),
        (T5Config(**SIZES), AutoModelForTokenClassification, ["classifier"]),
        (
            T5Config(**SIZES),
            AutoModelForSequenceClassification,
            ["classification_head.dense", "classification_head.out_proj"],
        ),
    ],
)
def test_the_head_of_t5_is_what_its_bare_model_lacks(config, auto_class, head):
    with torch.device("meta"):
        model = auto_class.from_config(config)
    assert outside_the_trunk(model) == head


def test_a_module_whose_name_only_begins_like_the_trunk_is_outside_it():
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = BertForSequenceClassification(config)
    model.add_module("bert_pooled", torch.nn.Linear(8, 8))
    assert outside_the_trunk(model) == ["bert_pooled", "classifier"]


def test_a_quantised_t5_spares_no_layer_but_its_head(t5, monkeypatch):
    given = {}

    def note(*_args, **options):
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", note)
    base = BaseModel(name=t5, load=BaseOptions(quantization={"load_in_4bit": True}))
    with pytest.raises(InterruptedError):
        base.model(AutoModelForSeq2SeqLM)
    assert not given["quantization_config"].llm_int8_skip_modules


def test_a_dry_run_of_t5_adapts_its_layers_and_counts_no_head(t5, tmp_path):
    values = {
        "task": "seq2seq",
        "model": t5,
        "output": str(tmp_path / "out"),
        "data": {"name": "unused"},
        "adapter": {"target_r": 2},
        "training": {"max_steps": 10},
    }
    planned = plan(recipe_from(values), splits_of(ROWS))
    assert planned.parameters["head"] == 0
    # encoder: 4 of attention, 2 of the feed-forward net; decoder: 4 + 4 + 2; each at rank 3
    assert planned.components_start == 3 * (6 + 10)
