"""An adapter folder in, what consumers read out: each of them computes the ΔW that was trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import consumers
from consumers import RefusedError
from dynlora.adapter.components import find_gated_layers
from dynlora.export import export_adapter
from dynlora.export.source import read_adapter
from tiny_models import adapted, layer_kinds, logits, tiny_bert, tiny_gpt2, tiny_llama, train

CLOSE = {"rtol": 0, "atol": 1e-6}  # fp32, another order of summation
EVERYWHERE = [consumers.vllm, consumers.vllm_before_patterns, consumers.diffusers]
ONE_RANK = [consumers.sglang, consumers.lorax, consumers.llama_cpp, consumers.mlx]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The base model's folder, a native checkpoint with dead modules, its ΔW and its logits."""
    root = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(root / "base")
    model = adapted(tiny_llama)
    allocator = train(model, steps=30, total_steps=40)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "native")
    deltas = {
        m.name: m.layer.get_delta_weight("default").detach()
        for m in find_gated_layers(model, "default")
        if not m.is_dropped
    }
    assert 0 in allocator.ranks().values()  # the fixture is worth nothing without a dead module
    return root, deltas, logits(model)


def exported(llama, tmp_path, **options):
    root, deltas, _ = llama
    export_adapter(root / "native", tmp_path / "out", **options)
    return tmp_path / "out", deltas


def assert_same(deltas, expected):
    """ΔW of every module; one that is absent on either side is zero."""
    for name in deltas.keys() | expected.keys():
        zero = torch.zeros_like(deltas.get(name, expected.get(name)))
        torch.testing.assert_close(deltas.get(name, zero), expected.get(name, zero), **CLOSE)


# -- rules of consumers --------------------------------------------------------------------------


@pytest.mark.parametrize("consumer", EVERYWHERE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_these_consumers_read_both_forms_right(llama, tmp_path, consumer, form):
    folder, expected = exported(llama, tmp_path, to=form)
    assert_same(consumer(folder), expected)


@pytest.mark.parametrize("consumer", ONE_RANK, ids=lambda c: c.__name__)
def test_consumers_with_one_rank_read_the_uniform_form_right(llama, tmp_path, consumer):
    folder, expected = exported(llama, tmp_path, to="uniform")
    deltas = consumer(folder)
    assert_same(deltas, expected)
    assert len(deltas) == 14  # every target module is there, the dead ones too


@pytest.mark.parametrize("consumer", ONE_RANK, ids=lambda c: c.__name__)
def test_and_the_ragged_form_wrong_or_not_at_all(llama, tmp_path, consumer):
    """Why there are two forms: where this test fails, that consumer has learnt to read ragged ranks."""
    folder, expected = exported(llama, tmp_path, to="ragged")
    with pytest.raises((RefusedError, AssertionError)):
        assert_same(consumer(folder), expected)


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_stock_peft_and_transformers_read_both_forms(llama, tmp_path, form):
    folder, _ = exported(llama, tmp_path, to=form)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder))
    assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(loaded), llama[2], **CLOSE)
    model = tiny_llama()
    model.load_adapter(str(folder))
    torch.testing.assert_close(logits(model), llama[2], **CLOSE)


# -- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [12, 30, 40])
def test_before_and_after_the_freeze_and_finished_it_is_the_same_function(tmp_path, steps):
    model = adapted(tiny_llama)
    allocator = train(model, steps=steps, total_steps=40)
    if steps == 40:
        allocator.finalize_()
    model.save_pretrained(tmp_path / "in")
    for form in ("ragged", "uniform"):
        export_adapter(tmp_path / "in", tmp_path / form, to=form)
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / form))
        torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)
    ragged = read_adapter(tmp_path / "ragged").ranks
    assert ragged == read_adapter(tmp_path / "in").ranks


def test_a_lora_from_elsewhere_is_exported_with_its_scaling(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3},
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "in")
    for form in ("ragged", "uniform"):
        export_adapter(tmp_path / "in", tmp_path / form, to=form)
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / form))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
        assert set(loaded.peft_config["default"].target_modules) == {"q_proj", "up_proj"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT finds out by itself
def test_every_layer_kind_keeps_its_function(tmp_path):
    kinds = ["embedding", "conv1d", "conv2d", "mha", "hf_conv1d", "linear"]
    model = adapted(layer_kinds, target_modules=kinds, target_r=2)
    train(model, steps=12, total_steps=40)
    model.save_pretrained(tmp_path / "in")
    for form in ("ragged", "uniform"):
        export_adapter(tmp_path / "in", tmp_path / form, to=form)
        loaded = PeftModel.from_pretrained(layer_kinds(), str(tmp_path / form))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_uniform_pads_to_the_asked_rank_and_never_below(llama, tmp_path):
    folder, expected = exported(llama, tmp_path, to="uniform", pad_to=32)
    assert {a.shape[0] for a, _ in consumers.pairs(folder).values()} == {32}
    assert_same(consumers.llama_cpp(folder), expected)
    with pytest.raises(ValueError, match="pad_to=1 is below the largest rank of the adapter"):
        exported(llama, tmp_path, to="uniform", pad_to=1)


def test_a_kind_without_a_live_module_is_padded_from_the_base_models_shapes(llama, tmp_path):
    root, _, _ = llama
    shutil.copytree(root / "native", tmp_path / "in")
    file = tmp_path / "in" / "adapter_model.safetensors"
    tensors = load_file(file)
    dead = [key for key in tensors if "down_proj" in key and not key.endswith("lora_ema")]
    tensors = {k: v[:0] if "lora_ema" in k and "down_proj" in k else v for k, v in tensors.items()}
    save_file({k: v.clone() for k, v in tensors.items() if k not in dead}, file)
    export_adapter(tmp_path / "in", tmp_path / "out", to="uniform")
    shapes = {n: b.shape for n, (_, b) in consumers.pairs(tmp_path / "out").items()}
    assert shapes["model.layers.0.mlp.down_proj"] == (16, 8)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj' fell to rank 0.*--base"):
        export_adapter(
            tmp_path / "in", tmp_path / "no", to="uniform", base=str(tmp_path / "absent")
        )
    assert not (tmp_path / "no").exists()


def test_dtype_is_that_of_the_file(llama, tmp_path):
    folder, _ = exported(llama, tmp_path, dtype=torch.bfloat16)
    assert {a.dtype for a, _ in consumers.pairs(folder).values()} == {torch.bfloat16}


def test_verify_reports_the_difference_of_outputs(llama, tmp_path):
    root, _, _ = llama
    for form in ("ragged", "uniform", "merged"):
        done = export_adapter(root / "native", tmp_path / form, to=form, verify=True)
        assert done.max_difference <= 1e-5


def test_configs_hold_no_field_that_older_pefts_would_warn_about(llama, tmp_path):
    """What PEFT 0.20 does not know is at its default, so it is left out; servers' fields stay."""
    folder, _ = exported(llama, tmp_path, to="uniform")
    config = consumers.config_of(folder)
    assert not {"kasa_config", "velora_config", "monteclora_config", "peft_version"} & set(config)
    assert {"r", "lora_alpha", "target_modules", "bias", "use_rslora", "peft_type"} <= set(config)


# -- merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_merged_weights_are_those_of_peft_in_the_bases_shards_and_dtype(tmp_path, shards):
    base = tiny_llama().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="5KB" if shards > 1 else "1GB")
    names = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    assert len(names) >= shards
    model = adapted(tiny_llama)
    train(model, steps=30, total_steps=40).finalize_()
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == names
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    adapter = read_adapter(tmp_path / "in")
    for name, weight in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict().items()
    ):
        assert merged[name].dtype == weight.dtype == torch.bfloat16
        a, b = adapter.factors.get(name.removesuffix(".weight"), (None, None))
        expected = weight if a is None else (weight.float() + b @ a).bfloat16()
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)


def test_merged_gpt2_is_transposed_and_keeps_its_tied_weights(tmp_path):
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    model = adapted(tiny_gpt2, fan_in_fan_out=True)
    train(model)
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    files = [set(load_file(tmp_path / n / "model.safetensors")) for n in ("base", "out")]
    assert files[0] == files[1]


MEASURE = """
import sys, threading, time
from dynlora.export import export_adapter
def own():  # memory that is no mapped file, in bytes
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
root, peak, done = sys.argv[1], [0], threading.Event()
def look():
    while not done.is_set():
        peak[0] = max(peak[0], own()); time.sleep(0.001)
before, watcher = own(), threading.Thread(target=look)
watcher.start()
export_adapter(root + "/in", root + "/out", to="merged", base=root + "/base")
done.set(); watcher.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_merging_holds_a_tensor_not_a_shard(tmp_path):
    """Beside the mapped file of one shard; a shard here is 64 MB, its largest tensor 2 MB."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    shard = (tmp_path / "base" / "model.safetensors").stat().st_size
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM(config), lora).save_pretrained(tmp_path / "in")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.5 * shard


def test_a_trained_head_moves_into_the_merged_model(tmp_path):
    """The base is an encoder without a head; what is written is the classifier."""
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    model = adapted(tiny_bert, task_type="SEQ_CLS")
    train(model)
    model.save_pretrained(tmp_path / "in")
    export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)


def test_tied_embeddings_are_not_merged_in_silence(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = adapted(tiny_gpt2, target_modules=["wte"], task_type="CAUSAL_LM", target_r=3)
    train(model)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(
        ValueError, match="'transformer.wte' shares its weight with the output layer"
    ):
        export_adapter(tmp_path / "in", tmp_path / "out", to="merged", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


# -- refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_exported_says_why(llama, tmp_path):
    root, _, _ = llama
    native = root / "native"
    for arguments, error, message in [
        ((tmp_path, tmp_path / "o"), FileNotFoundError, "holds no adapter_config.json"),
        ((native, native), ValueError, "is the source; name another folder"),
    ]:
        with pytest.raises(error, match=message):
            export_adapter(*arguments)
    with pytest.raises(ValueError, match="pad_to=8 belongs to the form uniform, not to ragged"):
        export_adapter(native, tmp_path / "o", pad_to=8)
    with pytest.raises(FileNotFoundError, match=r"base='nowhere' is no folder"):
        export_adapter(native, tmp_path / "o", to="merged", base="nowhere")
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean .*checkpoint-7"):
        export_adapter(tmp_path, tmp_path / "o")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "an adapter of method LOHA; only LoRA and DynLora"),
        ({"use_dora": True}, "trained with use_dora, which changes what its factors mean"),
    ],
    ids=str,
)
def test_other_methods_are_refused(tmp_path, change, message):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        export_adapter(tmp_path, tmp_path / "out")


def test_another_base_model_is_noticed_before_anything_is_written(llama, tmp_path):
    root, _, _ = llama
    tiny_gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has no weight for 13 of 13 adapted modules"):
        export_adapter(root / "native", tmp_path / "out", to="merged", base=str(tmp_path / "other"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]
