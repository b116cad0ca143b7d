"""Whatever a LoRA of PEFT can do, a DynLora adapter can do too; what it cannot, it refuses."""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dynlora import (
    DynLoraCallback,
    DynLoraConfig,
    RankAllocator,
    accept_dynlora_,
    export_lora,
)
from dynlora.adapter.components import find_gated_layers
from tiny_classifier import tiny_tokenizer
from tiny_models import (
    adapted,
    batch,
    config,
    layer_kinds,
    logits,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    train,
)

MODELS = {
    "llama": (tiny_llama, {}),
    "bert": (tiny_bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}),
    "gpt2 with Conv1D": (tiny_gpt2, {"fan_in_fan_out": True}),
    "t5": (tiny_t5, {"target_modules": ["q", "v", "wo"]}),
}
FP32 = {"rtol": 0, "atol": 1e-5}  # folding reorders products of fp32 numbers


def equal(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or FP32))


def differ(found, other):
    assert (found - other).abs().max() > 1e-3


def stock_layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def is_stock(model):
    return not [m for m in model.modules() if type(m).__module__.startswith("dynlora")]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


# -- get_peft_model and training -----------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_leaves_the_function_alone_and_trains_to_its_budget(name):
    build, fields = MODELS[name]
    model = adapted(build, **fields)
    equal(logits(model), logits(build()), rtol=0, atol=0)
    allocator = train(model)
    differ(logits(model), logits(build()))
    assert sum(allocator.ranks().values()) == allocator.target_components
    before = logits(model)
    allocator.finalize_()
    equal(logits(model), before)
    assert is_stock(model)


def test_print_trainable_parameters_counts_what_trains_and_falls_at_the_freeze(capsys):
    model = adapted()
    model.print_trainable_parameters()
    at_start = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {at_start:,} " in capsys.readouterr().out
    train(model)
    model.print_trainable_parameters()
    at_end = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {at_end:,} " in capsys.readouterr().out
    assert at_end < at_start / 2  # a quarter of the components, of uneven size


# -- save and load -------------------------------------------------------------------------------

MOMENTS = {
    "before training": 0,
    "inside the window": 5,
    "after the freeze": 12,
}


def saved(folder, steps):
    """A model trained for ``steps`` of 12, and saved by PEFT."""
    model = adapted()
    if steps:
        allocator = train(model, steps=steps, total_steps=12)
        assert allocator.is_frozen == (steps == 12)
        assert (0 in allocator.ranks().values()) == (steps == 12)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_saved_adapter_comes_back_whole(tmp_path, moment, options):
    model = saved(tmp_path, MOMENTS[moment])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
    assert type(loaded.peft_config["default"]) is DynLoraConfig
    equal(logits(loaded), logits(model), rtol=0, atol=0)
    ours, theirs = state(model), state(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)  # weights, gates, scores and masks
    gone = [m.name for m in find_gated_layers(model, "default") if m.is_dropped]
    assert bool(gone) == (moment == "after the freeze")
    layers = find_gated_layers(loaded, "default")
    assert [m.name for m in layers if m.is_dropped] == gone
    gates = [m.gate.requires_grad for m in layers if not m.is_dropped]
    assert set(gates) == {"is_trainable" in options}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_model_in_training_can_be_copied(tmp_path, moment, duplicate):
    model = saved(tmp_path, MOMENTS[moment])
    twin = duplicate(model)
    equal(logits(twin), logits(model), rtol=0, atol=0)
    assert state(twin).keys() == state(model).keys()


def test_an_adapter_in_training_loads_over_one_that_has_not_begun(tmp_path):
    model = saved(tmp_path, 12)
    other = adapted()
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    equal(logits(other), logits(model), rtol=0, atol=0)


# -- merging, switching off, several adapters ----------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # PEFT, of modules at rank 0
@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize("name", MODELS)
def test_merging_keeps_the_function_and_unmerging_undoes_it(name, steps):
    build, fields = MODELS[name]
    model = adapted(build, **fields)
    train(model, steps=steps, total_steps=12)
    before = logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        equal(logits(model), before)
        model.unmerge_adapter()
        equal(logits(model), before)
    merged = model.merge_and_unload()
    assert type(merged) is type(build())
    equal(logits(merged), before)


@pytest.mark.parametrize("steps", [5, 12])
def test_a_disabled_adapter_leaves_the_base_model(steps):
    model = adapted()
    train(model, steps=steps, total_steps=12)
    before = logits(model)
    with model.disable_adapter():
        equal(logits(model), logits(tiny_llama()), rtol=0, atol=0)
    equal(logits(model), before, rtol=0, atol=0)
    equal(logits(model.unload()), logits(tiny_llama()), rtol=0, atol=0)


def test_two_adapters_train_one_at_a_time_and_are_deleted_alone():
    model = adapted()
    train(model)
    first, kept = logits(model), state(model)
    model.add_adapter("second", config(target_r=2))
    model.set_adapter("second")
    equal(logits(model), logits(tiny_llama()), rtol=0, atol=0)
    allocator = train(model, adapter=None)  # the only one that is trainable
    assert allocator.adapter == "second"
    second = logits(model)
    differ(second, first)
    assert all(torch.equal(v, state(model)[k]) for k, v in kept.items())
    model.set_adapter("default")
    equal(logits(model), first, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    equal(logits(model), second, rtol=0, atol=0)
    assert not [k for k in model.state_dict() if "default" in k]
    allocator.finalize_()
    equal(logits(model), second)


def test_each_of_two_adapters_is_finalized_on_its_own():
    model = adapted()
    first = train(model)
    outputs = {"default": logits(model)}
    model.add_adapter("second", config(target_r=2))
    model.set_adapter("second")
    second = train(model)
    outputs["second"] = logits(model)
    first.finalize_()
    assert {n: type(c) for n, c in model.peft_config.items()} == {
        "default": LoraConfig,
        "second": DynLoraConfig,
    }
    second.finalize_()
    assert is_stock(model)
    for name, expected in outputs.items():
        model.set_adapter(name)
        equal(logits(model), expected)


def test_a_second_dynamic_adapter_is_trained_after_the_first_is_finished(tmp_path):
    model, _, _ = finished()
    first = logits(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", config())
    accept_dynlora_(model)
    equal(logits(model), first, rtol=0, atol=0)
    model.add_adapter("second", config(target_r=2))
    model.set_adapter("second")
    allocator = train(model)
    assert allocator.adapter == "second"
    second = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)  # the first, which is stock
    accept_dynlora_(again)
    again.load_adapter(tmp_path / "second", "second")
    for name, expected in (("default", first), ("second", second)):
        again.set_adapter(name)
        equal(logits(again), expected)
    assert sum(allocator.finalize_().values()) == 28
    assert is_stock(model)
    equal(logits(model), second)
    model.set_adapter("default")
    equal(logits(model), first)


def test_only_lora_adapters_stand_beside_dynamic_ones():
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no adapter: only LoRA adapters"):
        accept_dynlora_(tiny_llama())
    other = get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"holds \['IA3Config'\]: only LoRA adapters can stand"):
        accept_dynlora_(other)


def test_two_dynamic_adapters_are_trained_at_once_each_to_its_budget():
    model = adapted()
    model.add_adapter("second", config(target_r=2))
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    allocators = [
        RankAllocator(model, optimizer, total_steps=12, adapter=name)
        for name in ("default", "second")
    ]
    for _ in range(12):
        model(**batch(model.get_base_model())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = logits(model)
    assert [sum(a.finalize_().values()) for a in allocators] == [14, 28]
    equal(logits(model), before)
    assert is_stock(model)


def test_rows_of_one_batch_can_use_different_adapters():
    model = adapted()
    train(model)
    first = logits(model)
    model.add_adapter("second", config())
    model.set_adapter("second")
    train(model)
    second = logits(model)
    inputs = batch(model.get_base_model())
    names = ["default", "second", "__base__", "second"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
    rows = {"default": first, "second": second, "__base__": logits(tiny_llama())}
    equal(mixed, torch.stack([rows[name][i] for i, name in enumerate(names)]), rtol=0, atol=1e-6)


# -- transformers' own adapters, injection -------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 12])
def test_transformers_adds_saves_and_loads_an_adapter_in_training(tmp_path, steps):
    model = tiny_llama()
    model.add_adapter(config())
    train(model, steps=steps, total_steps=12)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DYNLORA"
    loaded = tiny_llama()
    loaded.load_adapter(tmp_path)
    equal(logits(loaded), logits(model), rtol=0, atol=0)
    model.disable_adapters()
    equal(logits(model), logits(tiny_llama()), rtol=0, atol=0)
    model.enable_adapters()
    equal(logits(model), logits(loaded), rtol=0, atol=0)


def test_transformers_saves_a_finished_adapter_as_plain_lora(tmp_path):
    model = tiny_llama()
    model.add_adapter(config())
    allocator = train(model)
    before = logits(model)
    allocator.finalize_()
    equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = tiny_llama()
    loaded.load_adapter(tmp_path)
    equal(logits(loaded), before)
    equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), before)


def test_an_injected_adapter_is_allocated_and_finalized():
    model = inject_adapter_in_model(config(), tiny_llama())
    allocator = train(model)
    before = logits(model)
    ranks = allocator.finalize_()
    assert sum(ranks.values()) == allocator.target_components
    assert 0 in ranks.values()
    equal(logits(model), before)
    assert is_stock(model)
    assert type(model.peft_config["default"]) is LoraConfig


# -- the finished adapter ------------------------------------------------------------------------


def finished(**fields):
    model = adapted(**fields)
    allocator = train(model)
    before = logits(model)
    ranks = allocator.finalize_()
    return model, before, ranks


def test_a_finished_model_is_stock_peft_with_the_same_function():
    model, before, ranks = finished()
    assert type(model.base_model) is LoraModel
    assert model.peft_type == PeftType.LORA
    assert type(model.peft_config["default"]) is LoraConfig
    assert is_stock(model)
    assert not [k for k in model.state_dict() if re.search(r"lora_(c|ema|live)|lora_A\.\w+\.c$", k)]
    assert 0 in ranks.values()
    assert len(stock_layers(model)) == sum(rank > 0 for rank in ranks.values())
    assert set(model.base_model.targeted_module_names) == set(ranks)
    equal(logits(model), before)
    equal(logits(model.merge_and_unload()), before)


CHILD = """
import json, sys
sys.modules["dynlora"] = None  # from here on, importing it fails
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM
folder, base = sys.argv[1:]
expected, ids = torch.load(f"{folder}/expected.pt")
for path in ("finished", "exported"):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), f"{folder}/{path}")
    assert type(model.peft_config["default"]) is LoraConfig
    other = LlamaForCausalLM.from_pretrained(base)
    other.load_adapter(f"{folder}/{path}")
    for m in (model, other, model.merge_and_unload()):
        print((m.eval()(ids).logits - expected).abs().max().item())
"""


def test_stock_peft_loads_a_finished_adapter_where_dynlora_is_not_installed(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted()
    allocator = train(model)
    torch.save(
        (logits(model), batch(model.get_base_model())["input_ids"]), tmp_path / "expected.pt"
    )
    export_lora(model, tmp_path / "exported")
    allocator.finalize_()
    model.save_pretrained(tmp_path / "finished")
    command = [sys.executable, "-W", "error::UserWarning", "-c", CHILD, tmp_path, tmp_path / "base"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    differences = [float(line) for line in child.stdout.split()]
    assert len(differences) == 6
    assert max(differences) <= FP32["atol"]


def test_a_trained_head_travels_with_the_adapter(tmp_path):
    model = adapted(tiny_bert, task_type="SEQ_CLS", target_modules=["query", "value"])
    allocator = train(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "exported")
    allocator.finalize_()
    model.save_pretrained(tmp_path / "finished")
    for folder in ("native", "exported", "finished"):
        equal(logits(PeftModel.from_pretrained(tiny_bert(), tmp_path / folder)), before)


def test_a_finished_adapter_can_be_trained_on_as_plain_lora():
    model, before, _ = finished()
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(**batch(model.get_base_model())).loss.backward()
    optimizer.step()
    differ(logits(model), before)


def test_a_finished_adapter_of_the_same_ranks_is_hotswapped(tmp_path):
    model, before, _ = finished(init_r=2, target_r=2)
    other, expected, _ = finished(init_r=2, target_r=2, init_std=0.5)
    differ(before, expected)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    equal(logits(model), expected)


def test_finished_adapters_of_other_ranks_are_hotswapped_by_their_weights(tmp_path):
    """PEFT's hotswap_adapter insists on equal alpha_patterns; the function below it does not."""
    model, before, ranks = finished(target_r=3)
    other, expected, fewer = finished()
    assert 0 not in ranks.values()
    assert 0 in fewer.values()
    other.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(model, tmp_path / "small", "default")
    for folder, target in (("small", expected), ("large", before)):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        tensors = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
        config = LoraConfig.from_pretrained(tmp_path / folder)
        hotswap_adapter_from_state_dict(model, tensors, "default", config)
        equal(logits(model), target)


# -- layer kinds ---------------------------------------------------------------------------------

KINDS = ("embedding", "hf_conv1d", "conv1d", "conv2d", "mha", "linear")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # one flag, two kinds
@pytest.mark.parametrize("kinds", [*([k] for k in KINDS), KINDS], ids=lambda k: "+".join(k))
def test_every_kind_of_layer_goes_all_the_way_to_plain_lora(tmp_path, kinds):
    model = adapted(layer_kinds, target_modules=list(kinds), target_r=2)
    equal(logits(model), logits(layer_kinds()), rtol=0, atol=0)
    allocator = train(model, lr=5e-2)
    before = logits(model)
    differ(before, logits(layer_kinds()))
    assert sum(allocator.ranks().values()) == allocator.target_components
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(layer_kinds(), tmp_path)
    assert is_stock(loaded.base_model)
    equal(logits(loaded), before)
    allocator.finalize_()
    equal(logits(model), before)
    equal(logits(loaded.merge_and_unload()), before)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("kind", [*KINDS, "mha.base_layer.out_proj"])
def test_every_kind_of_layer_can_fall_to_rank_0(tmp_path, kind):
    model = adapted(layer_kinds, target_modules=list(KINDS), target_r=2)
    allocator = train(model, steps=5, total_steps=12, lr=5e-2)
    for gated in allocator.layers:
        if gated.name == kind:
            gated.ema.zero_()
    allocator.freeze_()
    assert allocator.ranks()[kind] == 0
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "plain")
    before = logits(model)
    differ(before, logits(layer_kinds()))
    for folder in ("native", "plain"):
        equal(logits(PeftModel.from_pretrained(layer_kinds(), tmp_path / folder)), before)
    allocator.finalize_()
    equal(logits(model), before)
    equal(logits(model.merge_and_unload()), before)


def test_a_forward_of_attention_keeps_the_order_of_the_parameters():
    """Optimizer state is saved by position, and a new model has made no forward yet."""
    model = adapted(layer_kinds, target_modules=["mha"])
    before = [name for name, _ in model.named_parameters()]
    model(**batch(model.get_base_model()))
    assert [name for name, _ in model.named_parameters()] == before


# -- refused -------------------------------------------------------------------------------------


def test_add_weighted_adapter_is_refused():
    model = adapted()
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match="it would ignore their gates"):
        model.add_weighted_adapter(
            ["default", "second"], [0.5, 0.5], "both", combination_type="cat"
        )


def test_finished_adapters_can_be_weighted():
    model = adapted(target_r=3)
    first = train(model)
    model.add_adapter("second", config(target_r=2))
    model.set_adapter("second")
    second = train(model)
    first.finalize_()
    second.finalize_()
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.base_model.set_adapter(["default", "second"])
    summed = logits(model)
    model.set_adapter("both")
    equal(logits(model), summed)


def test_a_grouped_convolution_is_refused():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="matches '0', a convolution with groups=2"):
        get_peft_model(net, config(target_modules=["0"]))


def test_a_mixed_model_is_refused_by_name():
    with pytest.raises(ValueError, match="'DYNLORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), config(), mixed=True)


# -- TRL -----------------------------------------------------------------------------------------


def tokenizer():
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{i}" for i in range(30))]
    model = WordLevel({word: i for i, word in enumerate(words)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def test_sft_trainer_ends_with_a_plain_lora_of_the_budget(tmp_path):
    callback = DynLoraCallback()
    rows = [{"text": f"w{i % 30}"} for i in range(24)]
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=12,
            per_device_train_batch_size=2,
            learning_rate=2e-2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config(task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    assert sum(callback.ranks.values()) == 14
    assert type(trainer.model.peft_config["default"]) is LoraConfig
    trainer.save_model(str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    equal(logits(loaded), logits(trainer.model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # TRL's
def test_dpo_of_an_adapted_model_trains_one_copy_and_keeps_the_other_as_reference(tmp_path):
    """Given a PeftModel, TRL copies its adapter, gates included, into a frozen "ref"."""
    model = adapted(task_type="CAUSAL_LM")
    train(model, steps=5, total_steps=50)
    start = logits(model)
    rows = [{"prompt": "a film", "chosen": " good", "rejected": " bad"}] * 24
    words = tiny_tokenizer()
    words.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    callback = DynLoraCallback("default")
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=12, learning_rate=2e-2, report_to=[], bf16=False,
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert sum(callback.ranks.values()) == 14
    assert type(model.peft_config["default"]) is LoraConfig
    differ(logits(model), start)
    model.set_adapter("ref")
    equal(logits(model), start)
