"""Causal language models through TRL on a tiny Llama: plain text, instructions, messages."""

import json
import math
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.causal_lm import Options, _answers, read
from dynlora_lab.tasks.plan import plan
from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from dynlora_lab.tasks.typed_fields import RecipeError
from tiny_recipes import run_rows, save_model, splits_of, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
NUMBERS = ("one", "two", "three", "four", "five", "six")
PAIRS = [{"prompt": f"after {a}", "answer": b} for a, b in pairwise(NUMBERS)] * 4
TEXTS = [{"text": " ".join(NUMBERS)}] * 16
TALKS = [
    {
        "messages": [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["answer"]},
        ]
    }
    for pair in PAIRS
]


def save_base(folder, template=None):
    words = " ".join(NUMBERS)
    tokenizer = tiny_tokenizer([f"after {words} user assistant :"], eos_token="[SEP]")  # noqa: S106
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return save_model(folder, LlamaForCausalLM(config), tokenizer)


def run_lm(tmp_path, rows, template=None, **options):
    return run_rows(
        tmp_path,
        splits_of(rows),
        task="causal-lm",
        model=save_base(tmp_path / "base", template),
        options={"max_length": 16, **options},
        training={"num_train_epochs": 6, "learning_rate": 3e-2},
    )


def test_plain_text_is_packed_and_its_perplexity_counts_all_tokens(tmp_path):
    result = run_lm(tmp_path, TEXTS, packing=True)
    metrics = result.record["metrics"]
    lengths = {len(row["input_ids"]) for row in result.trainer.train_dataset}
    assert max(lengths) == 16
    assert len(lengths) <= 2  # full rows, and one rest
    before = result.record["evaluations"][0]
    assert metrics["eval_perplexity"] < before["eval_perplexity"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_nll"]))


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_only_the_answer_of_an_instruction_counts_and_it_can_be_written(tmp_path, template):
    result = run_lm(
        tmp_path, PAIRS, template, layout="instruction", generate="bleu", generate_rows=3,
        max_new_tokens=4,
    )  # fmt: skip
    metrics = result.record["metrics"]
    first = result.trainer.eval_dataset[0]
    counted = sum(label != -100 for label in first["labels"])
    assert 0 < counted < len(first["input_ids"])
    assert 1 <= metrics["eval_tokens"] / len(PAIRS) <= counted
    assert "eval_chrf" in metrics


def test_messages_end_in_the_answer_that_counts(tmp_path):
    result = run_lm(tmp_path, TALKS, TEMPLATE, layout="messages")
    whole = sum(len(row["input_ids"]) for row in result.trainer.eval_dataset)
    assert result.record["metrics"]["eval_tokens"] < whole / 2


def test_a_prompt_may_be_a_template_over_columns():
    data = read(Options(layout="instruction", prompt="Count on from {prompt}:"), splits_of(PAIRS))
    assert data.train[0] == {"prompt": "Count on from after one:", "completion": "two"}
    with pytest.raises(RecipeError, match=r"'\{no_such\}' does not fit the columns \['prompt'"):
        read(Options(layout="instruction", prompt="{no_such}"), splits_of(PAIRS))


def test_a_talk_without_an_answer_is_refused():
    odd = [{"messages": TALKS[0]["messages"][:1]}]
    with pytest.raises(RecipeError, match="row 0 of train does not end in a message of the assist"):
        read(Options(layout="messages"), splits_of(odd))


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="generate='rouge' needs answers"):
        Options(generate="rouge")
    with pytest.raises(ValueError, match="packing=True joins rows of plain text"):
        Options(layout="instruction", packing=True)


def recipe_of(tmp_path, model, **options):
    return recipe_from(
        {
            "task": "causal-lm",
            "model": model,
            "output": str(tmp_path / "out"),
            "data": {"name": "unused"},
            "options": {"max_length": 16, **options},
            "adapter": {"target_r": 2, "init_r": 3, "prune_interval": 2},
            "training": {"num_train_epochs": 6, "per_device_train_batch_size": 2},
        }
    )


def test_a_dry_run_counts_the_rows_that_packing_makes(tmp_path):
    rows = splits_of(TEXTS + [{"text": "one two"}] * 7)
    chosen = recipe_of(tmp_path, save_base(tmp_path / "base"), packing=True)
    foretold = plan(chosen, rows)
    assert not chosen.output.exists()
    record = run(chosen, splits=rows).record
    assert (
        foretold.steps == record["steps"] < 6 * 12
    )  # 23 rows in batches of 2, if none were packed
    assert foretold.train_rows == 23


def test_a_dry_run_leaves_out_rows_whose_answer_is_cut_off(tmp_path):
    long = {"prompt": " ".join(NUMBERS * 4), "answer": "two"}
    rows = splits_of([*PAIRS, *[long] * 10], PAIRS)
    chosen = recipe_of(tmp_path, save_base(tmp_path / "base"), layout="instruction")
    assert plan(chosen, rows).steps == 6 * len(PAIRS) // 2


def test_a_dry_run_refuses_an_encoder(tmp_path):
    tokenizer = tiny_tokenizer([" ".join(NUMBERS)], eos_token="[SEP]")  # noqa: S106
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = save_model(tmp_path / "bert", BertForMaskedLM(config), tokenizer)
    with pytest.raises(RecipeError, match="is a bert, an encoder, which sees the words"):
        plan(recipe_of(tmp_path, model), splits_of(TEXTS))


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_an_instruction_without_words_or_answer_is_refused(column):
    odd = [*PAIRS, {**PAIRS[0], column: " "}]
    with pytest.raises(RecipeError, match=f"row 20 of train has nothing in column '{column}'"):
        read(Options(layout="instruction"), splits_of(odd))


def test_written_answers_are_kept_and_held_against_the_rule(tmp_path):
    result = run_lm(
        tmp_path, PAIRS, TEMPLATE, layout="instruction", generate="bleu", generate_rows=10,
        max_new_tokens=4, rule="^(two|three)$",
    )  # fmt: skip
    lines = (tmp_path / "run" / "written.jsonl").read_text(encoding="utf8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["evaluation"] for a in answers] == [0] * 10 + [
        1
    ] * 10  # the base, then the finished model
    last = answers[10:]
    assert [a["expected"] for a in last] == [pair["answer"] for pair in PAIRS[:10]]
    assert last[0]["asked"] == "after one"
    kept = sum(a["written"] in ("two", "three") for a in last)
    assert result.record["metrics"]["eval_rule_kept"] == 10 * kept


def test_answers_do_not_depend_on_what_they_are_padded_to(tmp_path):
    folder = save_base(tmp_path / "base", TEMPLATE)
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = BaseModel(name=folder).tokenizer()
    prompts = ["one", "one two three four five six one two", "after six"]
    alone = [text for prompt in prompts for text in _answers(model, tokenizer, [prompt], 6)]
    assert _answers(model, tokenizer, prompts, 6) == alone
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "x"}, "rule='x' looks at written answers; set generate"),
        ({"rule": "(", "generate": "bleu"}, "must be a regular expression of Python"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Options(layout="instruction", **fields)


KNOWN = ["six five four", "three two one two three", "one five", "four four", "six one two"]


def save_known(folder, texts=KNOWN):
    path = folder / "known.jsonl"
    path.write_text("\n".join(json.dumps({"words": text}) for text in texts), encoding="utf8")
    return str(path)


def loss_of_each(model, tokenizer, texts):
    """Text by text, without padding: summed losses over the number of tokens that were predicted."""
    total = count = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += float(model.eval()(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count, count


@pytest.mark.parametrize(
    "adapter", [{}, {"method": "lora", "adapter": {"target_r": 2, "init_lora_weights": "pissa"}}]
)
def test_forgetting_is_the_loss_on_known_text_before_and_after_training(tmp_path, adapter):
    known = {
        "forgetting": save_known(tmp_path), "forgetting_text": "words", "forgetting_rows": len(KNOWN)
    }  # fmt: skip
    base = save_base(tmp_path / "base")
    record = run_rows(
        tmp_path,
        splits_of(TEXTS),
        task="causal-lm",
        model=base,
        options={"max_length": 16, **known},
        training={"num_train_epochs": 6, "learning_rate": 3e-2},
        **adapter,
    ).record
    found = record["forgetting"]
    tokenizer = BaseModel(name=base).tokenizer()
    before, tokens = loss_of_each(LlamaForCausalLM.from_pretrained(base), tokenizer, KNOWN)
    assert found["before"] == pytest.approx(before, rel=1e-4)
    assert found["tokens"] == tokens
    finished = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "run")
    after, _ = loss_of_each(finished, tokenizer, KNOWN)
    assert found["after"] == pytest.approx(after, rel=1e-4)
    assert abs(found["after"] - found["before"]) > 0.1


def test_forgetting_is_absent_where_no_data_is_named(tmp_path):
    assert "forgetting" not in run_lm(tmp_path, TEXTS).record


def test_known_text_is_checked_before_a_model_is_loaded(tmp_path):
    named = Options(forgetting=save_known(tmp_path))
    with pytest.raises(
        RecipeError, match="column 'text' is missing .* set options.forgetting_text"
    ):
        read(named, splits_of(TEXTS))
    blank = Options(forgetting=save_known(tmp_path, [*KNOWN, " "]), forgetting_text="words")
    with pytest.raises(RecipeError, match="has nothing in column 'words'"):
        read(blank, splits_of(TEXTS))
    with pytest.raises(RecipeError, match=r"'absent.csv' is not a file"):
        read(Options(forgetting="absent.csv"), splits_of(TEXTS))
