"""docs/frameworks.md: how frameworks that build the LoRA themselves bring the callback.

Where the framework is not installed, a stand-in calls as its public source does; it is written from what
that source does, and holds none of it.
"""

import importlib
import importlib.util
import sys
from dataclasses import fields
from inspect import signature
from types import ModuleType

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from doc_fences import fences
from dynlora import DynLoraCallback, RankAllocator
from dynlora.allocation import Settings

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


def adapted(r=4):
    config = LoraConfig(r=r, lora_alpha=8, target_modules=["layers.0", "layers.1", "layers.2"])
    return get_peft_model(Net(), config)


def trainer_of(folder, *, callbacks=None, r=4):
    draws = torch.Generator().manual_seed(1)
    rows = [
        {"x": torch.randn(10, generator=draws), "labels": torch.randn(10, generator=draws)}
        for _ in range(32)
    ]
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(adapted(r), arguments, train_dataset=rows, callbacks=callbacks)


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stand_in(monkeypatch, name, **names):
    """A module of a framework that is not installed, and the packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    vars(sys.modules[name]).update(names)


@pytest.fixture
def axolotl_plugin(monkeypatch):
    """The module of our plugin, on axolotl itself where it is installed."""
    name = "dynlora.integrations.axolotl"
    if importlib.util.find_spec("axolotl") is None:
        stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


KEYS = {"plugins": ["dynlora.integrations.axolotl.DynLoraPlugin"], "adapter": "lora"}


def axolotl_run(plugin, cfg, folder):
    """axolotl registers the plugin with the raw file, then asks it for callbacks of the built model."""
    mine = plugin.DynLoraPlugin()
    mine.register(cfg)
    return trainer_of(folder, callbacks=mine.add_callbacks_pre_trainer(cfg, adapted()))


def test_the_keys_of_the_page_name_the_plugin_and_its_target(axolotl_plugin):
    (file,) = [f for f in fences("docs/frameworks.md") if "plugins:" in f.text]
    cfg = yaml.safe_load(file.text)
    where, _, name = cfg["plugins"][0].rpartition(".")
    assert getattr(importlib.import_module(where), name) is axolotl_plugin.DynLoraPlugin
    assert axolotl_plugin.callback_of(cfg).settings == {"target_r": 8}


def test_the_axolotl_plugin_resumes_after_the_freeze(axolotl_plugin, tmp_path):
    cfg = KEYS | {"dynlora_target_r": 2, "dynlora_min_r": None}
    axolotl_run(axolotl_plugin, cfg, tmp_path).train()
    again = axolotl_run(axolotl_plugin, cfg, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FREEZE + 2}"))
    assert trained(again.model) <= AT_RANK_2


def test_the_axolotl_plugin_has_a_key_for_every_plain_argument_of_the_callback(axolotl_plugin):
    arguments = {f.name for f in fields(Settings)} | set(signature(DynLoraCallback).parameters)
    of_python = {"settings", "evaluate", "adapter", "rank_image", "score", "total_steps"}
    where, _, name = axolotl_plugin.DynLoraPlugin().get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(where), name).model_fields
    assert set(keys) == {f"dynlora_{name}" for name in arguments - of_python}
    given = axolotl_plugin.DynLoraArgs(dynlora_target_r="auto").model_dump(exclude_none=True)
    assert given == {"dynlora_target_r": "auto"}


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({}, ValueError, "dynlora_target_r is missing"),
        ({"dynlora_target_r": 2, "dynlora_minr": 1}, TypeError, "'minr'. Did you mean min_r"),
        (
            {"dynlora_target_r": 2, "dynlora_min_r": 0, "lora_o_kernel": True},
            ValueError,
            "dynlora_min_r=0 .* lora_o_kernel read the adapter of every module.*lora_o_kernel: false",
        ),
    ],
)
def test_the_axolotl_plugin_refuses_wrong_keys_before_a_model_is_loaded(
    axolotl_plugin, keys, error, message
):
    with pytest.raises(error, match=message):
        axolotl_plugin.DynLoraPlugin().register(KEYS | keys)


@pytest.mark.parametrize(("kernel", "min_r"), [(True, 1), (False, None)])
def test_axolotls_kernels_keep_a_component_in_every_module(axolotl_plugin, kernel, min_r):
    cfg = KEYS | {"dynlora_target_r": 2, "lora_mlp_kernel": kernel}
    assert axolotl_plugin.callback_of(cfg).settings.get("min_r") == min_r


def run_exp(folder, callbacks):
    """LLaMA-Factory: the list is extended by its own callbacks and handed to the trainer's class."""
    return trainer_of(folder, callbacks=[*callbacks])


def test_a_callback_that_llama_factory_hands_on_resumes_after_the_freeze(tmp_path):
    run_exp(tmp_path, [DynLoraCallback(target_r=2)]).train()
    again = run_exp(tmp_path, [DynLoraCallback(target_r=2)])
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FREEZE + 2}"))
    assert trained(again.model) <= AT_RANK_2


def test_the_plugin_file_for_ms_swift_resumes_after_the_freeze(monkeypatch, tmp_path):
    """ms-swift calls an entry with the arguments and the trainer, which is not built yet."""
    known = {}
    if importlib.util.find_spec("swift") is None:
        stand_in(monkeypatch, "swift.callbacks", callbacks_map=known)
    else:
        known = importlib.import_module("swift.callbacks").callbacks_map
    (file,) = [f for f in fences("docs/frameworks.md") if "callbacks_map" in f.text]
    file.run({})

    def swift_run():
        entry = known["dynlora"](None, object.__new__(Trainer))
        return trainer_of(tmp_path, callbacks=[entry], r=10)

    swift_run().train()
    again = swift_run()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FREEZE + 2}"))
    assert trained(again.model) <= 4 * AT_RANK_2  # the page's target is 8


def test_a_callback_that_is_added_later_must_be_told_of_the_model_to_resume(tmp_path):
    def added_later(*, tells_of_the_model):
        trainer, callback = trainer_of(tmp_path), DynLoraCallback(target_r=2)
        if tells_of_the_model:
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        trainer.add_callback(callback)
        return trainer

    first = added_later(tells_of_the_model=False)
    with pytest.warns(UserWarning, match="call callback.on_init_end.* before train"):
        first.train()
    assert trained(first.model) <= AT_RANK_2
    checkpoint = str(tmp_path / f"checkpoint-{FREEZE + 2}")
    with pytest.raises(RuntimeError, match="size mismatch"):
        added_later(tells_of_the_model=False).train(resume_from_checkpoint=checkpoint)
    again = added_later(tells_of_the_model=True)
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
