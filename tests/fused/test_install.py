"""Fusing and unfusing change the class of LoRA layers; saving, copying and merging go on as before."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as lora
from torch import nn

import tiny_models
from dynlora.fused import fuse_, unfuse_
from dynlora.fused.install import FusedLinear
from fused_nets import EXACT, adapted, assert_same, first, num_fused, pair
from small_net import data, small_net


def test_fusing_and_unfusing_change_the_class_and_nothing_else():
    model = adapted()
    parameters, state = list(model.parameters()), dict(vars(first(model)))
    assert [fuse_(model), fuse_(model)] == [2, 2]
    assert type(first(model)) is FusedLinear
    assert isinstance(first(model), lora.Linear)
    assert dict(vars(first(model))) == state
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    unfuse_(model)
    unfuse_(model)
    assert {type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)} == {lora.Linear}
    assert num_fused(model(data()[0])) == 0


def test_one_adapters_layers_alone_can_be_fused():
    model = adapted(target_modules=["0", "2"])
    model.add_adapter("other", LoraConfig(target_modules=["0", "1"]))
    assert fuse_(model, "other") == 2
    assert fuse_(model, "default") == 1
    assert fuse_(model) == 2


def test_an_adapter_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match=r"adapter='nobody' .* which has \['default'\]"):
        fuse_(adapted(), "nobody")


def test_layers_that_never_could_are_left_as_they_are():
    dora = adapted(use_dora=True)
    gpt2 = get_peft_model(
        tiny_models.tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    convolution = get_peft_model(
        nn.Sequential(nn.Conv1d(3, 4, 1)), LoraConfig(target_modules=["0"])
    )
    assert [fuse_(model) for model in (dora, gpt2, convolution, nn.Linear(2, 2))] == [0, 0, 0, 0]


def test_copies_and_pickles_stay_fused():
    model, plain = pair()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(twin, plain, data()[0], count=2)


def test_a_saved_adapter_is_pefts(tmp_path):
    fused, plain = adapted(target_modules=["0", "1"]), adapted(target_modules=["0", "1"])
    fuse_(fused)
    for name, model in (("fused", fused), ("plain", plain)):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = PeftModel.from_pretrained(small_net(), tmp_path / "fused")
    torch.testing.assert_close(loaded(data()[0]), plain(data()[0]), **EXACT)


def test_a_fused_model_merges_into_its_base():
    fused, plain = pair()
    expected = plain(data()[0])
    merged = fused.merge_and_unload()
    assert not any(isinstance(module, lora.LoraLayer) for module in merged.modules())
    torch.testing.assert_close(merged(data()[0]), expected, rtol=1e-5, atol=1e-5)
