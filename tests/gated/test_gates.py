"""The paper's gates as a PEFT method: saved, loaded, merged, folded; what cannot be done is refused."""

import copy
import json
import pickle
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from dynlora import DynLoraConfig, export_lora, finalize_
from dynlora.export import export_adapter
from dynlora.lora.components import find_components
from tiny_models import (
    KINDS,
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
from wrong_uses import grouped

MODELS = {
    "llama": (tiny_llama, {}),
    "bert": (tiny_bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}),
    "gpt2 with Conv1D": (tiny_gpt2, {"fan_in_fan_out": True}),
    "t5": (tiny_t5, {"target_modules": ["q", "v", "wo"]}),
}
MOMENTS = {"before training": 0, "inside the window": 5, "after the freeze": 12}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to|Already unmerged")


def equal(found, expected, atol=1e-5):  # folding reorders products of fp32 numbers
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def is_stock(model):
    return not [m for m in model.modules() if type(m).__module__.startswith("dynlora")]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}


def trained(moment, build=tiny_llama, **fields):
    model = adapted(build, gated=True, **fields)
    if MOMENTS[moment]:
        allocator = train(model, steps=MOMENTS[moment], total_steps=12)
        assert allocator.is_frozen == (moment == "after the freeze")
        assert not allocator.is_frozen or 0 in allocator.ranks().values()
    return model


def finished(**fields):
    model = adapted(gated=True, **fields)
    allocator = train(model)
    before = logits(model)
    return model, before, allocator.finalize_()


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_leaves_the_function_alone_and_ends_as_stock_peft(name):
    build, fields = MODELS[name]
    model = adapted(build, gated=True, **fields)
    equal(logits(model), logits(build()), atol=0)
    allocator = train(model)
    before = logits(model)
    assert (before - logits(build())).abs().max() > 1e-3
    ranks = allocator.finalize_()
    assert 0 in ranks.values()
    assert allocator.ranks() == ranks
    assert allocator.cost <= allocator.target_cost
    equal(logits(model), before)
    assert is_stock(model)
    assert type(model.base_model) is LoraModel
    assert model.peft_type == PeftType.LORA
    assert type(model.peft_config["default"]) is LoraConfig
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == sum(rank > 0 for rank in ranks.values())
    equal(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_saved_adapter_comes_back_whole(tmp_path, moment, options):
    model = trained(moment)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
    assert type(loaded.peft_config["default"]) is DynLoraConfig
    equal(logits(loaded), logits(model), atol=0)
    ours, theirs = state(model), state(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)  # weights and gates
    modules = find_components(loaded, "default")
    assert {m.name: m.rank for m in modules} == {
        m.name: m.rank for m in find_components(model, "default") if not m.is_dropped
    }
    gates = {m.gate.requires_grad for m in modules if not m.is_dropped}
    assert gates == {"is_trainable" in options}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_model_in_training_can_be_copied(moment, duplicate):
    model = trained(moment)
    twin = duplicate(model)
    equal(logits(twin), logits(model), atol=0)
    assert state(twin).keys() == state(model).keys()


@pytest.mark.parametrize("moment", list(MOMENTS)[1:])
@pytest.mark.parametrize("name", MODELS)
def test_merging_keeps_the_function_and_unmerging_undoes_it(name, moment):
    build, fields = MODELS[name]
    model = trained(moment, build, **fields)
    before = logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        equal(logits(model), before)
        model.unmerge_adapter()
        equal(logits(model), before)
    with model.disable_adapter():
        equal(logits(model), logits(build()))
    equal(logits(model.merge_and_unload()), before)


def test_each_of_two_adapters_is_finalized_on_its_own():
    model = adapted(gated=True)
    first = train(model)
    outputs = {"default": logits(model)}
    model.add_adapter("second", config(gated=True, target_r=2))
    model.set_adapter("second")
    second = train(model)
    outputs["second"] = logits(model)
    names = ["default", "second", "__base__", "second"]
    with torch.no_grad():
        mixed = model(**batch(model.get_base_model()), adapter_names=names).logits
    rows = {**outputs, "__base__": logits(tiny_llama())}
    equal(mixed, torch.stack([rows[name][i] for i, name in enumerate(names)]))
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


@pytest.mark.parametrize("moment", list(MOMENTS)[1:])
def test_transformers_adds_saves_and_loads_an_adapter_in_training(tmp_path, moment):
    model = tiny_llama()
    model.add_adapter(config(gated=True))
    train(model, steps=MOMENTS[moment], total_steps=12)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DYNLORA"
    loaded = tiny_llama()
    loaded.load_adapter(tmp_path)
    equal(logits(loaded), logits(model), atol=0)


def test_auto_starts_at_rank_16_and_waits_for_its_allocator():
    model = adapted(gated=True, target_r="auto", init_r=None)
    assert {m.rank for m in find_components(model, "default")} == {16}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(**batch(model.get_base_model())).loss.backward()
    with pytest.raises(RuntimeError, match="is being trained without a RankAllocator"):
        optimizer.step()


def test_an_injected_adapter_is_allocated_and_finalized():
    model = inject_adapter_in_model(config(gated=True), tiny_llama())
    allocator = train(model)
    before = logits(model)
    assert 0 in allocator.finalize_().values()
    equal(logits(model), before)
    assert is_stock(model)


GATED = [kind for kind in KINDS if kind not in {"embedding", "mha"}]


@pytest.mark.parametrize("kinds", [*([k] for k in GATED), GATED], ids=lambda k: "+".join(k))
def test_every_kind_of_layer_goes_all_the_way_to_plain_lora(tmp_path, kinds):
    model = adapted(layer_kinds, gated=True, target_modules=list(kinds), target_r=2)
    equal(logits(model), logits(layer_kinds()), atol=0)
    allocator = train(model, lr=5e-2)
    before = logits(model)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(layer_kinds(), tmp_path)
    assert is_stock(loaded.base_model)
    equal(logits(loaded), before)
    allocator.finalize_()
    equal(logits(model), before)
    equal(logits(loaded.merge_and_unload()), before)


@pytest.mark.parametrize("kind", GATED)
def test_every_kind_of_layer_can_fall_to_rank_0(tmp_path, kind):
    model = adapted(layer_kinds, gated=True, target_modules=GATED, target_r=2)
    allocator = train(model, steps=5, total_steps=12, lr=5e-2)
    for module in allocator.modules:
        if module.name == kind:
            module.ema.fill_(-1)
    allocator.freeze_()
    assert allocator.ranks()[kind] == 0
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "plain")
    before = logits(model)
    for folder in ("native", "plain"):
        equal(logits(PeftModel.from_pretrained(layer_kinds(), tmp_path / folder)), before)
    allocator.finalize_()
    equal(logits(model), before)
    equal(logits(model.merge_and_unload()), before)


def test_a_trained_head_travels_with_the_adapter(tmp_path):
    model = adapted(tiny_bert, gated=True, task_type="SEQ_CLS", target_modules=["query", "value"])
    allocator = train(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "native")
    allocator.finalize_()
    model.save_pretrained(tmp_path / "finished")
    for folder in ("native", "finished"):
        equal(logits(PeftModel.from_pretrained(tiny_bert(), tmp_path / folder)), before)


@pytest.mark.parametrize("tokens", [[5, 6], {"embed_tokens": [5, 6]}])
def test_trained_tokens_travel_with_the_adapter(tmp_path, tokens):
    model = adapted(gated=True, target_modules=["q_proj"], trainable_token_indices=tokens)
    train(model, steps=5, total_steps=12)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_stock_adapter_is_finalized_by_leaving_it_alone():
    model = adapted()
    before = state(model)
    assert set(finalize_(model).values()) == {4}
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


# -- refused -------------------------------------------------------------------------------------


def test_gates_cannot_be_weighted_but_finished_adapters_can():
    model = adapted(gated=True, target_r=3)
    first = train(model)
    model.add_adapter("second", config(gated=True, target_r=2))
    model.set_adapter("second")
    second = train(model)
    with pytest.raises(ValueError, match="it would ignore their gates"):
        model.add_weighted_adapter(
            ["default", "second"], [0.5, 0.5], "both", combination_type="cat"
        )
    first.finalize_()
    second.finalize_()
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.base_model.set_adapter(["default", "second"])
    summed = logits(model)
    model.set_adapter("both")
    equal(logits(model), summed)


def test_a_grouped_convolution_is_refused():
    model = grouped(config(gated=True, target_modules=["0"]))
    with pytest.raises(ValueError, match="'0' is a convolution with groups=2"):
        train(model)


@pytest.mark.parametrize(
    ("name", "kind"), [("embedding", "Embedding"), ("mha", "MultiheadAttention")]
)
def test_what_has_no_gated_form_is_refused_with_the_way_out(name, kind):
    with pytest.raises(ValueError, match=f"names '{name}', a {kind}, which .* train a LoraConfig"):
        adapted(layer_kinds, gated=True, target_modules=["linear", name])


def test_a_mixed_model_is_refused_by_name():
    with pytest.raises(ValueError, match="'DYNLORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), config(gated=True), mixed=True)


def test_a_vit_is_not_taken_for_a_mixture_of_experts():
    """Its class token and positions are tensors of three dimensions, too."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    model = get_peft_model(
        ViTForImageClassification(config), DynLoraConfig(target_r=1, target_modules="all-linear")
    )
    assert len([m for m in model.modules() if isinstance(m, LoraLayer)]) == 7  # the classifier too


@pytest.mark.parametrize("name", ["w1", "experts.down_proj.weight"])
def test_the_names_of_fused_experts_are_refused_not_left_out(name):
    from tiny_models import tiny_experts

    named = config(gated=True, target_modules=["q_proj", name])
    with pytest.raises(ValueError, match=rf"{name}.* match no module of MixtralForCausalLM, whose"):
        get_peft_model(tiny_experts(), named)


def as_an_earlier_version_saved(folder):
    """Scores and masks beside the factors, and modules of rank 0 in ``rank_pattern``."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf8"))
    dead = fields["exclude_modules"]
    assert dead
    fields["rank_pattern"] |= {f"^{re.escape(name)}": 0 for name in dead}
    fields["alpha_pattern"] |= {f"^{re.escape(name)}": 2.0 for name in dead}
    path.write_text(json.dumps(fields | {"exclude_modules": None, "schedule": "slow-fast"}))
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_A.c")]:
        gates, layer = tensors[key], key.removesuffix("lora_A.c")
        tensors |= {f"{layer}lora_ema": torch.ones_like(gates), f"{layer}lora_live": gates != 0}
    for name in dead:
        layer = f"base_model.model.{name}."
        empty = {f"{layer}lora_ema": torch.ones(0), f"{layer}lora_live": torch.ones(0).bool()}
        tensors |= empty
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_an_adapter_that_an_earlier_version_saved_loads_and_exports(tmp_path):
    model = trained("after the freeze")
    expected = logits(model)
    model.save_pretrained(tmp_path / "old")
    as_an_earlier_version_saved(tmp_path / "old")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "old")
    assert torch.equal(logits(loaded), expected)
    assert find_components(loaded, "default")[0].is_gated
    finalize_(loaded)
    equal(logits(loaded), expected)
    export_adapter(tmp_path / "old", tmp_path / "plain", to="ragged")
    equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")), expected)
