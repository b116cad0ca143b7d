"""The methods: what they train, how large they are, and what makes each of them what it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    RobertaConfig,
    T5Config,
)

from dynlora.allocation import Settings
from dynlora_lab.methods import METHODS, AdapterOptions, Target
from dynlora_lab.methods.bottleneck import Bottleneck
from dynlora_lab.methods.dynamic import random_score
from dynlora_lab.methods.lora import truncate_
from dynlora_lab.methods.trained_weights import save_trained
from small_net import attached, train
from tiny_methods import adapted, logits, scalings, tiny


@pytest.mark.parametrize("method", METHODS)
def test_no_method_changes_the_function_before_the_first_step(method):
    expected = logits(tiny())
    assert torch.allclose(logits(adapted(method).model), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_head_and_counts_what_it_trains_beside_it(method):
    made = adapted(method)
    trained = {n: p.numel() for n, p in made.model.named_parameters() if p.requires_grad}
    head = sum(n for name, n in trained.items() if ".classifier." in f".{name}")
    assert head == 16 * 3 + 3
    assert made.parameters() == sum(trained.values()) - head


def test_methods_of_one_budget_have_about_the_parameters_of_lora_at_that_rank():
    lora = adapted("lora").parameters()
    assert adapted("gated").parameters() == lora + 2 * 13  # one gate a component
    for method in ("houlsby", "pfeiffer"):
        one_wider = 2 * (2 * 16 + 1) * (2 if method == "houlsby" else 1)
        assert lora - one_wider < adapted(method).parameters() <= lora
    for method in ("dynlora", "dynlora-gated", "random", "adalora", "lora-svd", "lora-initial"):
        assert sum(adapted(method).ranks().values()) == 3 * 13


CHOSEN = {
    "target_r": 2,
    "tolerance": 0.05,
    "min_r": 1,
    "prune_start": 0.2,
    "prune_end": 0.6,
    "prune_interval": 3,
    "ema_beta": 0.5,
    "importance": "norm",
    "budget": "components",
    "revival": True,
    "dem_weight": 0.1,
    "compact": False,
}


def test_every_setting_of_a_recipe_reaches_the_callback_and_the_config():
    options = AdapterOptions(**CHOSEN)
    assert options.settings() == CHOSEN
    (callback,) = adapted("dynlora", options).callbacks
    assert callback.settings == options.settings()
    config = adapted("dynlora-gated", options).model.peft_config["default"]
    assert config.settings() == Settings(**CHOSEN)


def test_the_start_of_gates_reaches_the_gated_config_and_is_refused_elsewhere():
    options = AdapterOptions(init="kaiming", init_std=0.02)
    config = adapted("dynlora-gated", options).model.peft_config["default"]
    assert (config.init, config.init_std) == ("kaiming", 0.02)
    for method in ("dynlora", "random"):
        with pytest.raises(ValueError, match="choose method dynlora-gated"):
            adapted(method, options)


@pytest.mark.parametrize(
    "method", ["lora", "lora-initial", "lora-svd", "dynlora", "dynlora-gated", "random", "gated"]
)
def test_every_method_scales_its_updates_by_lora_alpha_over_target_r(method):
    options = AdapterOptions(target_r=2, init_r=5, lora_alpha=6)
    assert scalings(adapted(method, options).model) == {3.0}


def test_adalora_scales_by_the_same_number():
    model = adapted("adalora", AdapterOptions(target_r=2, init_r=5, lora_alpha=6)).model
    found = {m.scaling["default"] / float(m.ranknum["default"]) for m in svd_layers(model)}
    assert found == {3.0}


def svd_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_E")]


def test_dynlora_is_a_stock_lora_that_plain_lora_training_would_accept():
    config = adapted("dynlora").model.peft_config["default"]
    assert type(config) is LoraConfig
    assert (config.r, config.peft_type) == (3, "LORA")


def test_bitfit_trains_biases_alone():
    made = adapted("bitfit")
    trained = [n for n, p in made.model.named_parameters() if p.requires_grad]
    assert all(n.endswith("bias") or n.startswith("classifier") for n in trained)
    assert made.parameters() == sum(
        p.numel()
        for n, p in tiny().named_parameters()
        if n.endswith("bias") and not n.startswith("classifier")
    )


def test_bottlenecks_stand_where_their_papers_put_them():
    def places(method):
        model = adapted(method).model
        return [n.split("layer.")[1] for n, m in model.named_modules() if isinstance(m, Bottleneck)]

    assert places("pfeiffer") == ["0.output.dense", "1.output.dense"]
    assert places("houlsby") == [
        "0.attention.output.dense",
        "0.output.dense",
        "1.attention.output.dense",
        "1.output.dense",
    ]


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPES = [
    (GPT2Config(n_embd=16, n_layer=1, n_head=2), ["attn.c_proj"], ["mlp.c_proj"]),
    (LlamaConfig(**SMALL, intermediate_size=24), ["self_attn.o_proj"], ["mlp.down_proj"]),
    (MPNetConfig(**SMALL, intermediate_size=24), ["attention.attn.o"], ["output.dense"]),
    (RobertaConfig(**SMALL, intermediate_size=24), ["attention.output.dense"], ["output.dense"]),
    (
        DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2),
        ["attention.out_lin"],
        ["ffn.lin2"],
    ),
    (
        BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2,
        ),
        ["self_attn.out_proj", "self_attn.out_proj", "encoder_attn.out_proj"],
        ["fc2", "fc2"],
    ),
    (
        T5Config(d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=24),
        ["SelfAttention.o", "SelfAttention.o", "EncDecAttention.o"],
        ["DenseReluDense.wo", "DenseReluDense.wo"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "attention", "feed_forward"), SHAPES, ids=[c.model_type for c, *_ in SHAPES]
)
def test_sub_layers_are_found_in_every_architecture(config, attention, feed_forward):
    def places(method):
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        target = Target(model=model, head=[], task_type=None, seed=0)
        made = METHODS[method](AdapterOptions(bottleneck=2), target)
        return [n for n, m in made.model.named_modules() if isinstance(m, Bottleneck)]

    found = places("pfeiffer")
    assert [n for n, end in zip(found, feed_forward, strict=True) if not n.endswith(end)] == []
    others = [n for n in places("houlsby") if n not in found]
    assert [n for n, end in zip(others, attention, strict=True) if not n.endswith(end)] == []


def test_a_bottleneck_adds_its_nonlinear_path():
    layer = Bottleneck(nn.Linear(3, 4), width=2)
    nn.init.normal_(layer.up.weight)
    x = torch.randn(5, 3)
    y = layer.base(x)
    expected = y + layer.up(nn.functional.gelu(layer.down(y)))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("method", ["bitfit", "houlsby"])
def test_what_such_methods_save_gives_the_same_model_back(tmp_path, method):
    made = adapted(method)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    weights = load_file(save_trained(made.model, tmp_path))
    again = adapted(method).model
    assert again.load_state_dict(weights, strict=False).unexpected_keys == []
    assert torch.equal(logits(again), logits(made.model))


def test_truncation_keeps_the_best_approximation_of_the_whole_model():
    model = get_peft_model(tiny(), LoraConfig(r=3, lora_alpha=3, target_modules=["query", "key"]))
    updates = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            nn.init.normal_(module.lora_B["default"].weight)
            short = name.removeprefix("base_model.model.")
            updates[short] = module.get_delta_weight("default").detach()
    values = {name: torch.linalg.svdvals(update)[:3] for name, update in updates.items()}
    kept = torch.cat(list(values.values())).sort(descending=True).values[: 2 * len(updates)]
    ranks = truncate_(model, target_r=2)
    assert ranks == {name: int((s >= kept[-1]).sum()) for name, s in values.items()}
    left = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    error = sum((updates[n] - left.get(n, 0)).square().sum() for n in updates)
    dropped = torch.cat(list(values.values())).square().sum() - kept.square().sum()
    assert error == pytest.approx(float(dropped), rel=1e-4)


def test_truncation_in_parameters_leaves_no_more_than_a_lora_of_that_rank():
    targets = ["query", "intermediate.dense"]
    model = get_peft_model(tiny(), LoraConfig(r=3, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ranks = truncate_(model, target_r=1, budget="parameters")
    assert list(ranks) == [n for n, m in tiny().named_modules() if n.endswith(tuple(targets))]
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.8 * 144 < left <= 144 == 2 * (16 + 16) + 2 * (16 + 24)


def test_random_scores_are_drawn_once_and_by_the_seed_alone():
    class Layer:
        def __init__(self):
            self.ema = torch.zeros(4)

    first, second, other = ([Layer(), Layer()] for _ in range(3))
    random_score(1)(first, 1)
    random_score(1)(second, 1)
    random_score(2)(other, 1)
    drawn = [layer.ema.clone() for layer in first]
    random_score(1)(first, 1)
    assert all(torch.equal(a.ema, b) for a, b in zip(first, drawn, strict=True))
    assert all(torch.equal(a.ema, b.ema) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].ema, other[0].ema)
    assert not torch.equal(first[0].ema, first[1].ema)


def test_another_score_decides_what_is_pruned():
    def first_module_and_low_index_first(layers, _step):
        for place, gated in enumerate(layers):
            gated.ema.copy_(100 - 10 * place - torch.arange(len(gated.ema)))

    score = first_module_and_low_index_first
    model, optimizer, allocator = attached(total_steps=20, score=score, budget="components")
    train(model, optimizer, 20)
    assert list(allocator.ranks().values()) == [4, 2, 0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", AdapterOptions(target_r=2.5), "target_r=2.5 must be a whole number for lora"),
        (
            "adalora",
            AdapterOptions(target_r=2, init_r=2),
            "init_r=2 must be above adapter.target_r",
        ),
    ],
)
def test_ranks_that_a_method_cannot_have_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        adapted(method, options)


def test_a_model_without_biases_has_no_bitfit():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

    with pytest.raises(ValueError, match="method=bitfit trains biases, and Bare has none"):
        adapted("bitfit", model=Bare())
    with pytest.raises(ValueError, match="no sub-layer of Bare was found"):
        adapted("houlsby", model=Bare())


def test_lora_takes_the_ranks_of_a_finished_run():
    name = "bert.encoder.layer.{}.attention.self.{}".format
    ranks = {name(0, "query"): 3, name(0, "key"): 0, name(1, "value"): 1}
    made = adapted("lora", AdapterOptions(target_r=2, lora_alpha=8, ranks=ranks))
    assert made.ranks() == {name(0, "query"): 3, name(1, "value"): 1}
    layers = made.model.base_model.model.bert.encoder.layer
    assert layers[0].attention.self.query.scaling == {"default": 4.0}  # as at rank 2 everywhere
    assert layers[1].attention.self.value.scaling == {"default": 4.0}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"bert.encoder.layer.0.attention.self.qery": 1}, "it has 'bert.encoder.layer.0.attention"),
        ({"bert.pooler.dense": -1, "classifier": 1}, "must hold ranks of at least 0"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        adapted("lora", AdapterOptions(target_r=2, ranks=ranks))


def test_ranks_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="ranks must hold a rank above 0"):
        AdapterOptions(ranks={"a": 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must lie in \[0, 1\)"),
        ({"prune_start": 0.5, "prune_end": 0.5}, "prune_start=0.5, prune_end=0.5 must satisfy"),
        ({"prune_end": 1.5}, "prune_end=1.5 must satisfy 0 <= prune_start < prune_end <= 1"),
        ({"bottleneck": 0}, "bottleneck=0 must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be above 0"),
        ({"total_steps": 9}, "total_steps=9 must be left out: training.max_steps or"),
    ],
    ids=str,
)
def test_options_out_of_their_range_are_refused_with_the_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        AdapterOptions(**fields)
