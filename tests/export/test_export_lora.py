"""``export_lora`` of stock adapters: the folder computes what the model computes, whatever its layers."""

import json
import resource

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, set_seed

from dynlora import export_lora, finalize_
from dynlora.adapter_files.updates import read
from older_peft import LORA_ONLY
from stock_runs import run, stock
from tiny_models import VOCABULARY, adapted, layer_kinds, logits, tiny_bert, tiny_llama, train

CLOSE = {"rtol": 0, "atol": 1e-6}
KINDS = ["embedding", "conv1d", "conv2d", "mha", "hf_conv1d", "linear"]


def tiny_mixtral():
    set_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def reloaded(build, folder):
    return PeftModel.from_pretrained(build(), str(folder)).eval()


@pytest.mark.parametrize("steps", [18, 24])
def test_in_training_and_after_the_freeze_pruned_components_are_left_out(tmp_path, steps):
    model = stock()
    allocator = run(model, steps=steps)
    assert 0 in allocator.ranks().values()
    assert allocator.is_frozen == (steps == 24)
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    loaded = reloaded(tiny_llama, tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)
    torch.testing.assert_close(logits(model), expected, **CLOSE)  # the model is as it was
    pruned = {n for n, r in allocator.ranks().items() if r == 0}
    assert set(read(tmp_path / "out").pruned) == pruned
    config = loaded.peft_config["default"]
    assert type(config) is LoraConfig
    layers = {n: m for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert {n: m.r["default"] for n, m in layers.items()} == {
        n: r for n, r in allocator.ranks().items() if r
    }
    assert all(m.scaling["default"] == 2 for m in layers.values())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT's MultiheadAttention, of itself
@pytest.mark.parametrize("steps", [18, 24])
def test_every_kind_of_layer_is_exported(tmp_path, steps):
    model = stock(layer_kinds, target_modules=KINDS)
    allocator = run(model, steps=steps, target_r=1)
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    assert 0 in allocator.ranks().values()
    torch.testing.assert_close(
        logits(reloaded(layer_kinds, tmp_path / "out")), expected, rtol=0, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT: they do
def test_fused_experts_keep_their_order(tmp_path):
    fields = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    model = stock(tiny_mixtral, **fields)
    allocator = run(model, steps=18, target_r=2)
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    torch.testing.assert_close(
        logits(reloaded(tiny_mixtral, tmp_path / "out")), expected, rtol=0, atol=1e-5
    )
    assert len(set(allocator.ranks().values())) > 1


def test_a_start_that_changes_the_base_keeps_the_shapes_of_the_start(tmp_path):
    """PEFT changes the base at each load by the ranks in the config, so they must be the first ones."""
    model = stock(init_lora_weights="pissa")
    run(model, steps=18)
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, "pissa")
    torch.testing.assert_close(
        logits(reloaded(tiny_llama, tmp_path / "out")), expected, rtol=0, atol=1e-4
    )


def test_of_several_adapters_the_named_one_is_written(tmp_path):
    model = stock(init_lora_weights=False)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must name one of the model's LoRA adapters"):
        export_lora(model, tmp_path / "none")
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = logits(model)
        export_lora(model, tmp_path / name, name)
        torch.testing.assert_close(logits(reloaded(tiny_llama, tmp_path / name)), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 13 LoRA tensor")  # PEFT of its own lora_bias
@pytest.mark.parametrize("fields", [LORA_ONLY, {"bias": "all"}, {"lora_bias": True}])
def test_trained_heads_and_biases_come_along(tmp_path, fields):
    model = stock(tiny_bert, task_type="SEQ_CLS", **fields)
    run(model)
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    torch.testing.assert_close(logits(reloaded(tiny_bert, tmp_path / "out")), expected, **CLOSE)
    assert any("classifier" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))


@pytest.mark.parametrize("gated", [False, True])
def test_an_adapter_that_never_trained_keeps_its_rank(tmp_path, gated):
    """B is 0 everywhere, as LoRA starts: nothing was pruned."""
    model = adapted(tiny_llama, gated=True) if gated else stock()
    export_lora(model, tmp_path / "out")
    rank = model.peft_config["default"].r
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == rank
    torch.testing.assert_close(
        logits(reloaded(tiny_llama, tmp_path / "out")), logits(tiny_llama()), **CLOSE
    )


def test_a_gated_adapter_is_folded_and_stays_as_it_is_in_the_model(tmp_path):
    model = adapted(tiny_llama, gated=True)
    train(model, steps=30, total_steps=180)
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    torch.testing.assert_close(
        logits(reloaded(tiny_llama, tmp_path / "out")), expected, rtol=0, atol=1e-5
    )
    assert model.peft_config["default"].peft_type == "DYNLORA"


def test_what_is_finalized_is_saved_as_it_is_exported(tmp_path):
    model = stock()
    allocator = run(model, steps=40)
    ranks = allocator.finalize_()
    assert finalize_(model) == {n: r for n, r in ranks.items() if r}
    model.save_pretrained(tmp_path / "saved")
    export_lora(model, tmp_path / "exported")
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("saved", "exported")]
    torch.testing.assert_close(files[0], files[1], rtol=0, atol=0)


def test_a_model_adapted_through_transformers_is_exported(tmp_path):
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    export_lora(model, tmp_path / "out")
    torch.testing.assert_close(logits(reloaded(tiny_llama, tmp_path / "out")), expected, **CLOSE)


@pytest.mark.parametrize("limit", [0, 100, 600])
def test_an_export_onto_a_full_disk_keeps_the_previous_one(tmp_path, limit):
    model = stock(init_lora_weights=False)
    folder = export_lora(model, tmp_path / "out")
    before = files(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises((OSError, SafetensorError)):
            export_lora(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before
    export_lora(model, folder)
    assert files(tmp_path).keys() == before.keys()
    assert files(tmp_path) != before


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
