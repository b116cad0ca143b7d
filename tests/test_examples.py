"""Each script under examples/ runs as printed and leaves a plain LoRA that stock PEFT loads."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tiny_classifier import SPECIAL, WORDS, save_encoder, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "vocab_size": len(SPECIAL + WORDS),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
ROWS = 32

pytestmark = pytest.mark.filterwarnings("ignore", "error:.*:Warning:dynlora")


def save_language_model(folder, model_class, config):
    hf.set_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    tokenizer.save_pretrained(folder)


def save_llama(folder):
    config = hf.LlamaConfig(
        **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    save_language_model(folder, hf.LlamaForCausalLM, config)


def save_gpt2(folder):
    config = hf.GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    save_language_model(folder, hf.GPT2LMHeadModel, config)


def save_bart(folder):
    shape = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in shape.items()}
    config = hf.BartConfig(**SIZES, **sides, d_model=16, decoder_start_token_id=3,
                        forced_eos_token_id=None, max_position_embeddings=64)  # fmt: skip
    save_language_model(folder, hf.BartForConditionalGeneration, config)


LABELLED = [{"text": "good film", "label": 1}, {"text": "a poor film", "label": 0}]
CLASSIFIER = hf.AutoModelForSequenceClassification


@dataclass(frozen=True)
class Run:
    """What an example is fed, and what it must leave.

    Attributes:
        save_model: writes a tiny model to a folder.
        rows: rows of the data, repeated.
        rank: of the LoRA whose size the adapter may have at most, its ``target_r``; for ``auto`` its r.
        base: what loads the model under the finished adapter.
        length: arguments that say how long to train, and their values.
    """

    save_model: Callable[[Path], object]
    rows: list[dict[str, object]]
    rank: int
    base: Any
    length: tuple[str, ...] = ("--steps", "12")


RUNS = {
    "trainer_classification": Run(save_encoder, LABELLED, 4, CLASSIFIER),
    "trainer_auto_rank": Run(save_encoder, LABELLED, 16, CLASSIFIER),
    "seq2seq_summarization": Run(
        save_bart,
        [{"document": "a good fine film", "summary": "good film"}],
        8,
        hf.AutoModelForSeq2SeqLM,
    ),
    "trl_sft": Run(
        save_llama,
        [{"text": "a good film"}, {"text": "a bad film"}],
        8,
        hf.AutoModelForCausalLM,
    ),
    "trl_dpo": Run(
        save_llama,
        [{"prompt": "a film", "chosen": " good", "rejected": " bad"}],
        8,
        hf.AutoModelForCausalLM,
    ),
    "trl_grpo": Run(
        save_llama,
        [{"prompt": "a film", "answer": "good"}, {"prompt": "a film", "answer": "bad"}],
        8,
        hf.AutoModelForCausalLM,
        ("--steps", "12", "--tokens", "4"),
    ),
    "sentence_embeddings": Run(
        save_encoder,
        [{"anchor": "good", "positive": "fine"}, {"anchor": "bad", "positive": "poor"}],
        4,
        hf.AutoModel,
    ),
    "accelerate_loop": Run(save_encoder, LABELLED, 4, CLASSIFIER, ("--epochs", "6")),
    "pytorch_grad_scaler": Run(save_gpt2, [{"text": "a good film"}], 8, hf.AutoModelForCausalLM),
    "lightning_module": Run(save_encoder, LABELLED, 4, CLASSIFIER),
}


def run_example(name, folder, monkeypatch, *more):
    run = RUNS[name]
    run.save_model(folder / "model")
    (folder / "data").mkdir()
    lines = [json.dumps(run.rows[i % len(run.rows)]) for i in range(ROWS)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines), encoding="utf8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.chdir(folder)
    arguments = ["--model", "model", "--data", "data", "--output", "out", *run.length, *more]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_an_example_is_short_enough_to_copy(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf8").splitlines()) <= 60


TARGETS = {
    "query and value": ["query", "value"],
    "embeddings": ["query", "value", "dense"],
    "all": "all-linear",
}
ADAPTED = {
    "trainer_classification": "query and value",
    "accelerate_loop": "query and value",
    "sentence_embeddings": "embeddings",
}


def parameters_of_rank_one(name):
    """Parameters of a LoRA of rank 1 on the modules that the example adapts."""
    run = RUNS[name]
    is_decoder = run.base is hf.AutoModelForCausalLM
    config = LoraConfig(
        r=1,
        target_modules=TARGETS[ADAPTED.get(name, "all")],
        task_type="CAUSAL_LM" if is_decoder else "SEQ_CLS" if run.base is CLASSIFIER else None,
    )
    model = get_peft_model(run.base.from_pretrained("model"), config)
    return sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)


SLOW_TO_IMPORT = {"trl_dpo", "sentence_embeddings", "lightning_module", "seq2seq_summarization"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW_TO_IMPORT else []) for n in RUNS],
)
def test_an_example_leaves_a_plain_lora_of_its_size(name, tmp_path, monkeypatch):
    run_example(name, tmp_path, monkeypatch)
    config = PeftConfig.from_pretrained("out")
    assert type(config) is LoraConfig
    assert config.lora_alpha == 2 * config.r  # the scaling of the script's own config
    saved = {k: t for k, t in load_file("out/adapter_model.safetensors").items() if ".lora_" in k}
    found = sum(t.numel() for t in saved.values())
    assert found <= RUNS[name].rank * parameters_of_rank_one(name)
    if name != "trainer_auto_rank":  # as much as fits
        assert found > (RUNS[name].rank - 1) * parameters_of_rank_one(name)
    assert all(t.any() for t in saved.values())
    loaded = PeftModel.from_pretrained(RUNS[name].base.from_pretrained("model"), "out")
    present = {k: t for k, t in loaded.state_dict().items() if ".lora_" in k}
    assert {k.replace(".default", "") for k in present} == set(saved)
    assert all(torch.equal(t, saved[k.replace(".default", "")]) for k, t in present.items())


@pytest.mark.slow
@pytest.mark.slow
def test_the_reinforced_example_runs_with_rloo_too(tmp_path, monkeypatch):
    names = run_example("trl_grpo", tmp_path, monkeypatch, "--method", "rloo")
    assert names["has_answer"](["a good film", "a film"], ["good", "good"]) == [1.0, 0.0]
    assert type(PeftConfig.from_pretrained("out")) is LoraConfig


def test_a_lightning_run_resumes_at_the_same_weights(tmp_path, monkeypatch):
    import lightning

    names = run_example("lightning_module", tmp_path, monkeypatch)
    classifier = names["Classifier"]
    loader = DataLoader([next(iter(names["loader"]))] * 12, batch_size=None)
    ends = []
    for checkpoint in (None, 3, 5, 6, 9):  # before, in and after the window, which ends at 6
        hf.set_seed(1)
        module = classifier("model")
        saver = lightning.pytorch.callbacks.ModelCheckpoint(
            "saved", "{step}", every_n_train_steps=1, save_top_k=-1
        )
        trainer = lightning.Trainer(
            max_steps=12, callbacks=[] if checkpoint else [saver], logger=False,
            enable_checkpointing=checkpoint is None, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        module.model.eval()
        path = f"saved/step={checkpoint}.ckpt" if checkpoint else None
        trainer.fit(module, loader, ckpt_path=path)
        ends.append((module.allocator.ranks(), module.state_dict()))
    for ranks, state in ends[1:]:
        assert ranks == ends[0][0]
        assert state.keys() == ends[0][1].keys()
        assert all(torch.equal(state[k], t) for k, t in ends[0][1].items())
