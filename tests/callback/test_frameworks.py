"""docs/frameworks.md: how frameworks that build the LoRA themselves bring the callback, by stand-ins.

A stand-in calls as the framework's public source does; it is written from what that source does, and holds
none of it.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from dynlora import DynLoraCallback, RankAllocator

STEPS = 12
FREEZE = 6
AT_RANK_2 = 3 * 2 * 20  # parameters


class Net(nn.Module):
    """Three linear layers and a loss, as Trainer wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(10, 10) for _ in range(3)))

    def forward(self, x, labels):
        return {"loss": F.mse_loss(self.layers(x), labels)}


def adapted():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layers.0", "layers.1", "layers.2"])
    return get_peft_model(Net(), config)


def trainer_of(folder, *, callbacks=None, steps=STEPS):
    draws = torch.Generator().manual_seed(1)
    rows = [
        {"x": torch.randn(10, generator=draws), "labels": torch.randn(10, generator=draws)}
        for _ in range(32)
    ]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(adapted(), arguments, train_dataset=rows, callbacks=callbacks)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class AxolotlPlugin:
    """Asked for callbacks with the finished model before the trainer is built."""

    def add_callbacks_pre_trainer(self, _cfg, model):
        return [DynLoraCallback(target_r=2, min_r=1)]


def run_exp(folder, callbacks):
    """LLaMA-Factory: the list is extended by its own callbacks and handed to the trainer's class."""
    return trainer_of(folder, callbacks=[*callbacks])


BUILT_WITH = {
    "axolotl": lambda f: trainer_of(
        f, callbacks=AxolotlPlugin().add_callbacks_pre_trainer({}, adapted())
    ),
    "LLaMA-Factory": lambda f: run_exp(f, [DynLoraCallback(target_r=2)]),
}


@pytest.mark.parametrize("name", BUILT_WITH)
def test_a_callback_that_the_trainer_is_built_with_resumes_after_the_freeze(name, tmp_path):
    BUILT_WITH[name](tmp_path).train()
    again = BUILT_WITH[name](tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FREEZE + 2}"))
    assert trained(again.model) <= AT_RANK_2


def added_later(folder, *, tells_of_the_model):
    """ms-swift 4: an entry of ``callbacks_map`` is called with the arguments and the built trainer."""

    def entry(args, trainer):
        callback = DynLoraCallback(target_r=2)
        if tells_of_the_model:
            callback.on_init_end(args, trainer.state, trainer.control, model=trainer.model)
        return callback

    trainer = trainer_of(folder)
    trainer.add_callback(entry(trainer.args, trainer))
    return trainer


@pytest.mark.parametrize("tells_of_the_model", [False, True])
def test_a_callback_that_is_added_later_must_be_told_of_the_model_to_resume(
    tells_of_the_model, tmp_path
):
    first = added_later(tmp_path, tells_of_the_model=tells_of_the_model)
    first.train()
    assert trained(first.model) <= AT_RANK_2
    again = added_later(tmp_path, tells_of_the_model=tells_of_the_model)
    checkpoint = str(tmp_path / f"checkpoint-{FREEZE + 2}")
    if not tells_of_the_model:
        with pytest.raises(RuntimeError, match="size mismatch"):
            again.train(resume_from_checkpoint=checkpoint)
        return
    again.train(resume_from_checkpoint=checkpoint)
    assert again.model.state_dict().keys() == first.model.state_dict().keys()
    assert trained(again.model) == trained(first.model)


class Kernel(nn.Module):
    """Unsloth's way: the factors of every adapted layer are read at each call, past PEFT's forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        for layer in self.model.base_model.model.layers:
            adapter = layer.active_adapters[0]
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            x = layer.base_layer(x) + layer.scaling[adapter] * x @ a.t() @ b.t()
        return x


@pytest.mark.parametrize("min_r", [0, 1])
def test_a_kernel_that_reads_every_layers_factors_needs_min_r(min_r):
    model = adapted()
    kernel = Kernel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = 1 if min_r else 0.4
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, target_r=target, min_r=min_r)
    x = torch.randn(8, 10)
    for _ in range(FREEZE):
        optimizer.zero_grad()
        kernel(x).square().mean().backward()
        optimizer.step()
    assert allocator.is_frozen
    if min_r:
        assert kernel(x).shape == (8, 10)
    else:
        with pytest.raises(KeyError):
            kernel(x)
