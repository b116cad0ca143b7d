"""How a Trainer run with the callback ends and goes on: gated adapters, modules that fell to rank 0."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from dynlora import DynLoraCallback, DynLoraConfig

TARGETS = ["wide", "narrow", "last"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.last = nn.Linear(4, 24), nn.Linear(24, 6), nn.Linear(6, 2)

    def forward(self, x, labels):
        y = self.last(torch.tanh(self.narrow(torch.tanh(self.wide(x)))))
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def trainer(folder, config, callback, **fields):
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = [{"x": row, "labels": int(row.sum() > 0)} for row in rows]
    fixed = {"max_steps": 20, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
    fixed |= {"per_device_train_batch_size": 8, "use_cpu": True, "logging_steps": 5}
    arguments = TrainingArguments(folder, **fixed, **fields)
    return Trainer(model, arguments, train_dataset=data, callbacks=[callback])


def test_a_run_with_gates_ends_as_a_plain_lora_and_tells_its_cost(tmp_path):
    callback = DynLoraCallback()
    config = DynLoraConfig(target_r=1, init_r=2, target_modules=TARGETS, prune_interval=2)
    trainer(tmp_path, config, callback, save_strategy="no").train()
    end = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert end["ranks"] == callback.ranks
    sizes = {"wide": 28, "narrow": 30, "last": 8}
    assert end["cost"] == sum(sizes[name] * rank for name, rank in callback.ranks.items()) > 0


@pytest.mark.parametrize("at", [10, 15])
def test_a_run_whose_modules_fell_to_rank_0_goes_on_bit_for_bit(tmp_path, at):
    def run(folder, resume=None):
        callback = DynLoraCallback(target_r=0.5, prune_interval=2)
        config = LoraConfig(r=2, target_modules=TARGETS)
        saving = {"save_strategy": "steps", "save_steps": 5}
        made = trainer(tmp_path / folder, config, callback, **saving)
        made.train(resume_from_checkpoint=resume)
        return callback.ranks, made.model.state_dict()

    ranks, weights = run("whole")
    assert 0 in ranks.values()
    again, others = run("again", resume=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert again == ranks
    assert all(torch.equal(weights[name], others[name]) for name in weights)
