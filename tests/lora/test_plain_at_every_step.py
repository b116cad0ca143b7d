"""Before, inside and after the window the model and its checkpoints are a plain LoRA of stock PEFT."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.hotswap import hotswap_adapter

from dynlora import RankAllocator, warm_start_
from tiny_models import (
    adapted,
    batch,
    config,
    logits,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    train,
)

MOMENTS = {"before the window": 1, "inside it": 5, "after the freeze": 12}
in_every_moment = pytest.mark.parametrize("moment", MOMENTS)
MODELS = {
    "llama": (tiny_llama, {"task_type": "CAUSAL_LM"}),
    "bert": (tiny_bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}),
    "gpt2 with Conv1D": (tiny_gpt2, {"fan_in_fan_out": True}),
    "t5": (tiny_t5, {"target_modules": ["q", "v", "wo"]}),
}


def trained(moment, build=tiny_llama, **fields):
    """A model in the midst of its run, which has a module of rank 0 after the freeze."""
    model = adapted(build, **fields)
    allocator = train(model, steps=MOMENTS[moment], total_steps=12, prune_interval=1)
    assert allocator.is_frozen == (moment == "after the freeze")
    assert not allocator.is_frozen or 0 in allocator.ranks().values()
    assert bool(allocator.history) == (moment != "before the window")
    return model, allocator


def equal(found, expected, atol=0.0):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


CHILD = """
import sys
sys.modules["dynlora"] = None  # from here on, importing it fails
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM
folder, base = sys.argv[1:]
for moment in ("before the window", "inside it", "after the freeze", "finished"):
    expected, ids = torch.load(f"{folder}/{moment}.pt")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), f"{folder}/{moment}")
    assert type(model.peft_config["default"]) is LoraConfig
    other = LlamaForCausalLM.from_pretrained(base)
    other.load_adapter(f"{folder}/{moment}")
    pickled = torch.load(f"{folder}/{moment}/model.pt", weights_only=False)
    for m in (model, other, pickled):
        print((m.eval()(ids).logits - expected).abs().max().item())
"""


def test_checkpoints_and_pickled_models_load_where_dynlora_is_not_installed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    for moment in (*MOMENTS, "finished"):
        model, allocator = trained(moment.replace("finished", "after the freeze"))
        if moment == "finished":
            allocator.finalize_()
        model.save_pretrained(tmp_path / moment)
        torch.save(model, tmp_path / moment / "model.pt")
        ids = batch(model.get_base_model())["input_ids"]
        torch.save((logits(model), ids), tmp_path / f"{moment}.pt")
    command = [sys.executable, "-W", "error::UserWarning", "-c", CHILD, tmp_path, tmp_path / "base"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert [float(line) for line in child.stdout.split()] == [0.0] * 12


@in_every_moment
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_stock_peft_at_every_moment(tmp_path, name, moment):
    build, fields = MODELS[name]
    model, _ = trained(moment, build, **fields)
    assert model.peft_type == PeftType.LORA
    assert type(model.base_model) is LoraModel
    assert type(model.peft_config["default"]) is LoraConfig
    assert not [m for m in model.modules() if type(m).__module__.startswith("dynlora")]
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    equal(logits(PeftModel.from_pretrained(build(), tmp_path)), before)
    with model.disable_adapter():
        equal(logits(model), logits(build()))
    equal(logits(copy.deepcopy(model).merge_and_unload()), before, atol=1e-5)


@in_every_moment
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_of_the_model_is_free_of_the_run(moment, duplicate):
    model, _ = trained(moment)
    twin = duplicate(model)
    equal(logits(twin), logits(model))
    fresh = adapted(r=2)
    with pytest.raises(RuntimeError, match="size mismatch|Unexpected|Missing"):
        twin.load_state_dict(fresh.state_dict())  # the copy follows no checkpoint


@in_every_moment
def test_transformers_adds_saves_and_loads_an_adapter_in_training(tmp_path, moment):
    model = tiny_llama()
    model.add_adapter(config())
    train(model, steps=MOMENTS[moment], total_steps=12)
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(tmp_path)
    equal(logits(loaded), logits(model))
    model.disable_adapters()
    equal(logits(model), logits(tiny_llama()))
    model.enable_adapters()
    equal(logits(model), logits(loaded))


def test_an_injected_adapter_is_allocated():
    model = inject_adapter_in_model(config(), tiny_llama())
    allocator = train(model)
    before = logits(model)
    assert 0 in allocator.finalize_().values()
    equal(logits(model), before, atol=1e-5)


def test_a_trained_head_travels_with_the_adapter(tmp_path):
    model = adapted(tiny_bert, task_type="SEQ_CLS", target_modules=["query", "value"])
    allocator = train(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "checkpoint")
    allocator.finalize_()
    model.save_pretrained(tmp_path / "finished")
    for folder in ("checkpoint", "finished"):
        equal(logits(PeftModel.from_pretrained(tiny_bert(), tmp_path / folder)), before, atol=1e-5)


def test_two_adapters_train_one_at_a_time_and_both_keep_their_function():
    model = adapted()
    first = train(model)
    assert 0 in first.ranks().values()
    outputs = {"default": logits(model)}
    model.add_adapter("second", config())
    model.set_adapter("second")
    equal(logits(model), logits(tiny_llama()))
    second = train(model, target_r=2)  # the only one that is trainable
    assert second.adapter == "second"
    outputs["second"] = logits(model)
    for allocator in (first, second):
        allocator.finalize_()
    for name, expected in outputs.items():
        model.set_adapter(name)
        equal(logits(model), expected, atol=1e-5)
    names = ["default", "second", "__base__", "second"]
    with torch.no_grad():
        mixed = model(**batch(model.get_base_model()), adapter_names=names).logits
    rows = {**outputs, "__base__": logits(tiny_llama())}
    equal(mixed, torch.stack([rows[name][i] for i, name in enumerate(names)]), atol=1e-5)


def test_two_adapters_are_trained_at_once_each_to_its_budget():
    model = adapted()
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    allocators = [
        RankAllocator(model, optimizer, total_steps=12, adapter=name, target_r=target)
        for name, target in (("default", 1), ("second", 2))
    ]
    for _ in range(12):
        model(**batch(model.get_base_model())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = logits(model)
    for allocator in allocators:
        allocator.finalize_()
        assert allocator.cost <= allocator.target_cost
    assert 2 * allocators[0].target_cost == allocators[1].target_cost
    equal(logits(model), before, atol=1e-5)


def test_another_adapter_can_be_loaded_beside_one_with_modules_of_rank_0(tmp_path):
    model, _ = trained("after the freeze")
    before = logits(model)
    other, _ = trained("inside it")
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    equal(logits(model), before)
    model.set_adapter("other")
    equal(logits(model), logits(other))


def test_hotswapping_an_adapter_of_the_same_ranks(tmp_path):
    model, _ = trained("after the freeze")
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data.mul_(2)
    other, _ = trained("after the freeze")
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    equal(logits(model), logits(other))


def test_a_finished_adapter_can_be_trained_on_and_rotated():
    model, allocator = trained("after the freeze")
    allocator.finalize_()
    before = logits(model)
    warm_start_(model)
    equal(logits(model), before, atol=1e-5)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(**batch(model.get_base_model())).loss.backward()
    optimizer.step()
    assert (logits(model) - before).abs().max() > 1e-4


def test_layers_stay_where_they_are_when_their_module_falls_to_rank_0():
    """Whoever holds a reference to the layer, as compiled graphs do, holds the right one."""
    model = adapted()
    before = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    train(model)
    assert before == {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
