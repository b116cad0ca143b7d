"""An adapter folder in, ragged and uniform out: each consumer computes the ΔW that was trained."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import consumers
from consumers import RefusedError
from dynlora.adapter_files.updates import read
from dynlora.export import export_adapter
from older_peft import LORA_ONLY, saves_biases_of_layers
from stock_runs import run, stock
from test_export_lora import KINDS, tiny_mixtral
from tiny_models import adapted, layer_kinds, logits, tiny_bert, tiny_gpt2, tiny_llama, train

CLOSE = {"rtol": 0, "atol": 1e-6}  # fp32, another order of summation
EVERYWHERE = [consumers.vllm, consumers.vllm_before_patterns, consumers.diffusers]
ONE_RANK = [consumers.sglang, consumers.lorax, consumers.llama_cpp, consumers.mlx]
WEIGHTS = "adapter_model.safetensors"


def saved(model, folder, ranks):
    """The folder of a checkpoint, with the history that a run leaves beside it."""
    model.save_pretrained(folder)
    start = {"event": "start", "step": 0, "ranks": dict.fromkeys(ranks, 4)}
    (folder / "history.jsonl").write_text(json.dumps(start) + "\n")


@pytest.fixture(scope="module", params=["stock", "gated"])
def llama(request, tmp_path_factory):
    """The base model's folder, a checkpoint with pruned modules, its ΔW and its logits."""
    root = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(root / "base")
    if request.param == "stock":
        model = stock()
        allocator = run(model)
    else:
        model = adapted(tiny_llama, gated=True)
        allocator = train(model, steps=30, total_steps=40)
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    saved(model, root / "in", allocator.ranks())
    deltas = {
        m.name: m.layer.get_delta_weight("default").detach()
        for m in allocator.modules
        if not m.is_dropped
    }
    assert 0 in allocator.ranks().values()  # the fixture is worth nothing without a pruned module
    return root, deltas, logits(model)


def exported(llama, tmp_path, **options):
    root, deltas, _ = llama
    export_adapter(root / "in", tmp_path / "out", **options)
    return tmp_path / "out", deltas


def assert_same(deltas, expected):
    """ΔW of every module; one that is absent on either side is zero."""
    for name in deltas.keys() | expected.keys():
        zero = torch.zeros_like(deltas.get(name, expected.get(name)))
        torch.testing.assert_close(deltas.get(name, zero), expected.get(name, zero), **CLOSE)


def both_forms_compute(build, folder, expected, tmp_path, *, atol=1e-5, **options):
    for form in ("ragged", "uniform"):
        export_adapter(folder, tmp_path / form, to=form, **options)
        loaded = PeftModel.from_pretrained(build(), str(tmp_path / form))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=atol)


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
    assert len(deltas) == 14  # every target module is there, the pruned ones too


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


# -- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [18, 24, 40])
def test_before_and_after_the_freeze_and_finished_it_is_the_same_function(tmp_path, steps):
    model = stock()
    tiny_llama().save_pretrained(tmp_path / "base")
    allocator = run(model, steps=steps)
    ranks = allocator.finalize_() if steps == 40 else allocator.ranks()
    saved(model, tmp_path / "in", ranks)
    base = str(tmp_path / "base")
    both_forms_compute(tiny_llama, tmp_path / "in", logits(model), tmp_path, base=base)
    written = {u.name: u.rank for u in read(tmp_path / "ragged").updates}
    assert written == {n: r for n, r in ranks.items() if r}


def test_a_lora_from_elsewhere_is_exported_with_its_scaling(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3},
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "in")
    both_forms_compute(tiny_llama, tmp_path / "in", logits(model), tmp_path)
    for form in ("ragged", "uniform"):
        fields = consumers.config_of(tmp_path / form)
        assert fields["target_modules"] == ["q_proj", "up_proj"]


def test_what_the_user_excluded_was_not_pruned(tmp_path):
    """A full name in exclude_modules looks like a pruned module, and stays out of both forms."""
    excluded = "model.layers.0.self_attn.q_proj"
    model = stock(target_modules=["q_proj"], exclude_modules=[excluded], init_lora_weights=False)
    model.save_pretrained(tmp_path / "in")
    assert read(tmp_path / "in").pruned == ()
    both_forms_compute(tiny_llama, tmp_path / "in", logits(model), tmp_path)
    assert excluded not in consumers.pairs(tmp_path / "uniform")


def test_zeros_of_padding_go_again(llama, tmp_path):
    """Ragged of uniform is ragged of the source."""
    folder, _ = exported(llama, tmp_path, to="ragged")
    exported(llama, tmp_path / "u", to="uniform")
    export_adapter(tmp_path / "u" / "out", tmp_path / "again")
    files = [load_file(f / WEIGHTS) for f in (folder, tmp_path / "again")]
    torch.testing.assert_close(files[0], files[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT finds out by itself
@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT's MultiheadAttention, of itself
@pytest.mark.parametrize("make", ["stock", "gated"])
def test_every_layer_kind_keeps_its_function(tmp_path, make):
    if make == "stock":
        model = stock(layer_kinds, target_modules=KINDS)
        run(model, steps=18, target_r=1)
    else:
        kinds = [kind for kind in KINDS if kind not in {"embedding", "mha"}]
        model = adapted(layer_kinds, gated=True, target_modules=kinds, target_r=2)
        train(model, steps=12, total_steps=40)
    model.save_pretrained(tmp_path / "in")
    both_forms_compute(layer_kinds, tmp_path / "in", logits(model), tmp_path)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT: they do
def test_fused_experts_keep_their_order_in_both_forms(tmp_path):
    fields = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    model = stock(tiny_mixtral, init_lora_weights=False, **fields)
    with torch.no_grad():  # of each expert in layer 0 one slot is empty
        for name, parameter in model.named_parameters():
            if "layers.0" in name and "experts" in name and "lora_B" in name:
                parameter[:, -4:] = 0
    model.save_pretrained(tmp_path / "in")
    both_forms_compute(tiny_mixtral, tmp_path / "in", logits(model), tmp_path)
    ranks = {u.name: u.rank for u in read(tmp_path / "ragged").updates}
    assert ranks["model.layers.0.mlp.experts"] == 3
    assert ranks["model.layers.1.mlp.experts"] == 4


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor")  # PEFT of its own lora_bias
@pytest.mark.parametrize("fields", [LORA_ONLY, {"bias": "all"}, {"lora_bias": True}])
def test_trained_biases_keep_their_modules(tmp_path, fields):
    model = stock(tiny_bert, task_type="SEQ_CLS", **fields)
    run(model)
    model.save_pretrained(tmp_path / "in")
    both_forms_compute(tiny_bert, tmp_path / "in", logits(model), tmp_path)


@saves_biases_of_layers
def test_a_bias_of_a_module_that_has_lost_its_factors_is_kept(tmp_path):
    """In a file of an older version; ragged leaves the module out and uniform wraps it again."""
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    model = stock(tiny_bert, bias="lora_only", init_lora_weights=False, task_type="SEQ_CLS")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    module = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{module}.lora_")}
    save_file(tensors, tmp_path / "in" / WEIGHTS)
    names = ["bert.encoder.layer.0.attention.self.query"]
    names += [u.name for u in read(tmp_path / "in").updates]
    start = {"event": "start", "step": 0, "ranks": dict.fromkeys(names, 4)}
    (tmp_path / "in" / "history.jsonl").write_text(json.dumps(start) + "\n")
    for name, layer in model.get_base_model().named_modules():
        if name == names[0]:
            layer.scaling["default"] = 0.0
    both_forms_compute(
        tiny_bert, tmp_path / "in", logits(model), tmp_path, base=str(tmp_path / "base")
    )
    assert f"{module}.bias" in load_file(tmp_path / "ragged" / WEIGHTS)
    assert f"{module}.base_layer.bias" in load_file(tmp_path / "uniform" / WEIGHTS)


# -- forms ---------------------------------------------------------------------------------------


def test_uniform_pads_to_the_asked_rank_and_never_below(llama, tmp_path):
    folder, expected = exported(llama, tmp_path, to="uniform", pad_to=32)
    assert {a.shape[0] for a, _ in consumers.pairs(folder).values()} == {32}
    assert_same(consumers.llama_cpp(folder), expected)
    with pytest.raises(ValueError, match="pad_to=1 is below the largest rank of the adapter"):
        exported(llama, tmp_path, to="uniform", pad_to=1)


def test_uniform_without_the_base_of_a_pruned_module_says_so(llama, tmp_path):
    root, _, _ = llama
    shutil.copytree(root / "in", tmp_path / "in")
    file = tmp_path / "in" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"fell to rank 0 and only its base model.*--base"):
        export_adapter(tmp_path / "in", tmp_path / "no", to="uniform")
    with pytest.raises(FileNotFoundError, match=r"base='.*absent' is not a model that"):
        export_adapter(
            tmp_path / "in", tmp_path / "no", to="uniform", base=str(tmp_path / "absent")
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_a_pruned_kind_of_gpt2_is_padded_the_right_way_round(tmp_path):
    """transformers' Conv1D stores (in, out), and an Embedding's factors have keys of their own."""
    tiny_gpt2().save_pretrained(tmp_path / "base")

    def score(modules, _step):
        for module in modules:
            worth = 1.0 if "c_attn" in module.name else 1e-6
            module.ema.copy_(torch.full_like(module.ema, worth))

    model = stock(tiny_gpt2, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)
    allocator = run(model, score=score, target_r=1)
    assert {n for n, r in allocator.ranks().items() if r == 0} > {"transformer.wte"}
    saved(model, tmp_path / "in", allocator.ranks())
    expected = logits(model)
    both_forms_compute(tiny_gpt2, tmp_path / "in", expected, tmp_path, base=str(tmp_path / "base"))
    tensors = load_file(tmp_path / "uniform" / WEIGHTS)
    assert tensors["base_model.model.transformer.wte.lora_embedding_A"].shape == (8, 40)
    assert tensors["base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"].shape == (64, 8)


def test_dtype_is_that_of_the_file(llama, tmp_path):
    folder, _ = exported(llama, tmp_path, dtype=torch.bfloat16)
    assert {a.dtype for a, _ in consumers.pairs(folder).values()} == {torch.bfloat16}


def test_verify_reports_the_difference_of_outputs(llama, tmp_path):
    root, _, _ = llama
    for form in ("ragged", "uniform"):
        done = export_adapter(root / "in", tmp_path / form, to=form, verify=True)
        assert done.max_difference <= 1e-5 < done.max_output


def test_configs_hold_no_field_that_older_pefts_would_warn_about(llama, tmp_path):
    """What PEFT 0.20 does not know is at its default, so it is left out; servers' fields stay."""
    folder, _ = exported(llama, tmp_path, to="uniform")
    config = consumers.config_of(folder)
    assert not {"kasa_config", "velora_config", "monteclora_config", "peft_version"} & set(config)
    assert {"r", "lora_alpha", "target_modules", "bias", "use_rslora", "peft_type"} <= set(config)


def test_target_modules_become_a_list_for_servers_that_read_no_expression(tmp_path):
    model = stock(target_modules=r".*\.(q|v)_proj", init_lora_weights=False)
    model.save_pretrained(tmp_path / "in")
    both_forms_compute(tiny_llama, tmp_path / "in", logits(model), tmp_path)
    assert len(consumers.sglang(tmp_path / "uniform")) == 4
