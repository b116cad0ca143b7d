"""Exports at their edges: damaged sources, bases that do not fit, models that cannot be compared."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    ViTConfig,
    ViTModel,
)

from dynlora.export import export_adapter
from dynlora.export.merged import add_update
from small_net import data, small_net
from tiny_models import adapted, logits, tiny_bert, tiny_llama, tiny_t5, train

WEIGHTS = "adapter_model.safetensors"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")


@pytest.fixture
def plain(tmp_path):
    """The folder of a plain LoRA of rank 2, not all zero."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def refused(source, error, message, **options):
    """The export fails with this message and leaves nothing."""
    target = source.parent / "out"
    with pytest.raises(error, match=message):
        export_adapter(source, target, **options)
    assert not target.exists()


# -- sources -----------------------------------------------------------------------------------


def test_a_pickle_is_not_read(plain):
    (plain / WEIGHTS).rename(plain / "adapter_model.bin")
    refused(plain, FileNotFoundError, "adapter_model.bin is a pickle, which may run code; load and")


def test_a_file_that_was_cut_off_is_named(plain):
    whole = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(plain, ValueError, f"{WEIGHTS} is no whole safetensors file: ")


def test_a_module_without_one_of_its_factors_is_named(plain):
    tensors = load_file(plain / WEIGHTS)
    del tensors[B]
    save_file(tensors, plain / WEIGHTS)
    refused(plain, ValueError, "'model.layers.0.self_attn.q_proj' has only a part of its factors")


def test_factors_of_two_ranks_are_a_damaged_file(plain):
    tensors = load_file(plain / WEIGHTS)
    tensors[A] = tensors[A][:1].clone()
    save_file(tensors, plain / WEIGHTS)
    refused(plain, ValueError, r"has factors of rank 1 and 2; the file is damaged")


def test_an_adapter_without_a_living_component_is_its_base_model(tmp_path):
    model = adapted(tiny_llama)
    for name, parameter in model.named_parameters():
        if name.endswith((".c", ".lora_c")):
            parameter.data.zero_()
    model.save_pretrained(tmp_path / "in")
    refused(tmp_path / "in", ValueError, "every component is 0, so the adapter equals its base")


# -- bases -------------------------------------------------------------------------------------


def test_an_update_of_another_shape_is_not_added():
    weight, a, b = torch.zeros(4, 4), torch.zeros(1, 3), torch.zeros(4, 1)
    message = r"q.weight has shape \(4, 4\) in the base model, its update has \(4, 3\): this is not"
    with pytest.raises(ValueError, match=message):
        add_update(weight, a, b, transposed=False, key="q.weight")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quantization_config": {"load_in_8bit": True}}, ValueError, "is quantised: an update cannot"),
        (None, FileNotFoundError, "holds neither model.safetensors nor model.safetensors.index.json"),
    ],
    ids=["quantised", "no weights"],
)  # fmt: skip
def test_a_base_that_cannot_be_added_to_is_refused(plain, tmp_path, change, error, message):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    if change is None:
        (tmp_path / "base" / "model.safetensors").unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(plain, error, message, to="merged", base=str(tmp_path / "base"))


def test_an_adapter_that_names_no_base_asks_for_one(plain):
    refused(plain, ValueError, "does not name its base model; give its folder", to="merged")


def test_merging_in_another_dtype_says_so_in_the_config(plain, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    old = {"torch_dtype": "float32", **json.loads(config.read_text())}  # as older versions wrote it
    config.write_text(json.dumps(old))
    options = {"to": "merged", "base": str(tmp_path / "base"), "dtype": torch.bfloat16}
    export_adapter(plain, tmp_path / "out", **options)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["dtype"] == "bfloat16"
    assert "torch_dtype" not in told
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


def test_a_head_of_another_size_brings_its_number_of_labels(tmp_path):
    """The base was pretrained without labels, so its config counts transformers' two."""
    fields = {k: v for k, v in tiny_bert().config.to_dict().items() if "label" not in k}
    BertModel(BertConfig(**fields)).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = adapted(lambda: base, task_type="SEQ_CLS")
    train(model)
    model.save_pretrained(tmp_path / "in")
    done = export_adapter(
        tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"), verify=True
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-6)
    assert done.max_difference < 1e-6 < done.max_output


def test_a_base_without_a_config_is_merged_without_one(tmp_path):
    net = small_net()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(small_net(), config)
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    net.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(net(data()[0]), model(data()[0]), rtol=0, atol=1e-6)


# -- comparing ---------------------------------------------------------------------------------


def test_a_model_of_an_encoder_and_a_decoder_is_compared_too(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "base")
    model = adapted(tiny_t5, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    train(model)
    model.save_pretrained(tmp_path / "in")
    done = export_adapter(
        tmp_path / "in", tmp_path / "out", base=str(tmp_path / "base"), verify=True
    )
    assert done.max_difference <= 1e-5 * done.max_output
    assert done.max_output > 0


def test_a_model_of_pictures_cannot_be_compared_on_tokens(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = ViTModel(ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="model=.* takes no token ids, so --verify cannot feed it"):
        export_adapter(tmp_path / "in", tmp_path / "out", base=str(tmp_path / "base"), verify=True)
