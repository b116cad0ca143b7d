"""TRL's trainers with the user's own LoraConfig and one callback."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trl  # loads a trainer when it is asked for
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dynlora import DynLoraCallback, DynLoraConfig
from lora_runs import (
    ENDS,
    R,
    adapted,
    callback,
    config,
    finished,
    logits,
    ranks_of,
    save_language_model,
    train,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
ROWS = 16
FINAL = sorted(r for r in ENDS if r)
TEXT = {"text": "a good film"}
PAIR = {"prompt": "a film", "chosen": " good", "rejected": " bad"}
LABELLED = {"prompt": "a film", "completion": " good", "label": True}
PROMPT = {"prompt": "a film"}


def lengths(completions, **_columns):
    """A reward that differs between the completions of one prompt."""
    return [float(len(set(text))) for text in completions]


@dataclass(frozen=True)
class Kind:
    """One of TRL's trainers, with rows that it learns from; ``name`` is what its class and config share."""

    name: str
    rows: list[dict[str, Any]]
    fields: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    task: str = "CAUSAL_LM"


GENERATED = {"max_completion_length": 4, "num_generations": 2, "temperature": 1.0}
REWARD = {"reward_funcs": lengths}
KINDS = {
    "sft": Kind("SFT", [TEXT]),
    "dpo": Kind("DPO", [PAIR]),
    "kto": Kind(
        "KTO",
        [LABELLED, LABELLED | {"completion": " bad", "label": False}],
    ),
    "reward": Kind(
        "Reward",
        [PAIR],
        load=functools.partial(AutoModelForSequenceClassification.from_pretrained, num_labels=1),
        task="SEQ_CLS",
    ),
    "rloo": Kind("RLOO", [PROMPT], GENERATED, REWARD),
    "grpo": Kind("GRPO", [PROMPT], GENERATED | {"beta": 0.1}, REWARD),
}


def trl_trainer(kind, folder, *, callbacks, model=None, peft_config=None, **fields):
    where = save_language_model(folder / "model")
    rows = Dataset.from_list([kind.rows[i % len(kind.rows)] for i in range(ROWS)])
    arguments = getattr(trl, f"{kind.name}Config")(
        str(folder / "out"),
        **{
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }
        | kind.fields
        | fields,
    )
    return getattr(trl, f"{kind.name}Trainer")(
        kind.load(where) if model is None else model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(where),
        callbacks=callbacks,
        peft_config=peft_config,
        **kind.extra,
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_trainer_ends_with_a_plain_lora_of_the_budget(name, tmp_path):
    kind, mine = KINDS[name], callback()
    run = trl_trainer(kind, tmp_path, callbacks=[mine], peft_config=config(task_type=kind.task))
    run.train()
    run.save_model()
    assert mine.allocator.step == 10
    assert sorted(mine.ranks.values()) == sorted(ENDS)
    saved = PeftConfig.from_pretrained(tmp_path / "out")
    assert type(saved) is LoraConfig
    loaded = PeftModel.from_pretrained(kind.load(tmp_path / "model"), tmp_path / "out")
    assert sorted(ranks_of(loaded).values()) == FINAL


@pytest.mark.parametrize("name", KINDS)
def test_until_the_first_cut_the_run_is_the_one_without_the_callback(name, tmp_path):
    kind = KINDS[name]
    found = {}
    for key, callbacks in {"with": [callback()], "without": []}.items():
        run = trl_trainer(
            kind,
            tmp_path / key,
            callbacks=callbacks,
            peft_config=config(task_type=kind.task),
        )
        run.train()
        found[key] = [e["loss"] for e in run.state.log_history if "loss" in e][:3]
    assert found["with"] == found["without"]
    assert len(found["with"]) == 3


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_copied_reference_adapter_keeps_its_shapes_while_the_trained_one_shrinks(name, tmp_path):
    """TRL keeps a frozen copy of an adapter that it trains on, under the name ref."""
    model, mine = finished(), callback(score=None, target_r=1.0)
    before, outputs = ranks_of(model), logits(model)
    run = trl_trainer(KINDS[name], tmp_path, callbacks=[mine], model=model)
    run.train()
    run.save_model()
    assert ranks_of(run.model, "ref") == before
    assert sum(ranks_of(run.model).values()) == len(before) < sum(before.values())
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out"
    )
    assert ranks_of(loaded) == ranks_of(run.model)
    run.model.set_adapter("ref")
    torch.testing.assert_close(logits(run.model), outputs, rtol=0, atol=1e-5)


def test_the_papers_gates_end_as_a_plain_lora_of_the_budget(tmp_path):
    mine = DynLoraCallback()
    fields = {"init_r": R, "target_r": 1, "prune_interval": 2, "target_modules": "all-linear"}
    gates = DynLoraConfig(**fields, task_type="CAUSAL_LM")
    run = trl_trainer(KINDS["sft"], tmp_path, callbacks=[mine], peft_config=gates)
    assert run.model.peft_type == "DYNLORA"
    run.train()
    run.save_model()
    assert mine.allocator.cost <= mine.allocator.target_cost
    assert type(run.model.peft_config["default"]) is LoraConfig
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "grpo", "rloo"])
def test_trl_itself_refuses_to_synchronise_a_reference_with_an_adapter(name, tmp_path):
    with pytest.raises((ValueError, NotImplementedError), match="sync_ref_model"):
        trl_trainer(
            KINDS[name],
            tmp_path,
            callbacks=[callback()],
            peft_config=config(),
            sync_ref_model=True,
        )


def test_averaging_parameter_by_parameter_into_a_reference_needs_compact_off():
    """What a synchronisation by parameter order would do, as in TRL's SyncRefModelCallback."""
    from trl.trainer.callbacks import SyncRefModelCallback

    model, reference = adapted(), adapted()

    def sync(allocator):
        SyncRefModelCallback._sync_target_model(model, reference, 0.5)
        seen.append(allocator.step)

    seen = []
    with pytest.raises((ValueError, RuntimeError), match=r"argument 2|must match|size"):
        train(model, each=sync)
    assert seen == [1, 2, 3, 4]
    model, reference = adapted(), adapted()
    train(model, each=sync, compact=False)
    assert torch.isfinite(next(p for p in reference.parameters() if p.requires_grad)).all()
