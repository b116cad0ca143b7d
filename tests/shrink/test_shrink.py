"""A finished LoRA cut by its singular values: every layer kind, every rule, what is written and refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import set_seed

from dynlora.adapter_files.updates import read
from dynlora.adapter_files.write import write_adapter
from dynlora.shrink import shrink_adapter
from older_peft import saves_biases_of_layers
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not find a config file:UserWarning",
    # peft 0.21.2 looks for patterns among modules only, not among bare parameters
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
)

WEIGHTS = "adapter_model.safetensors"


class Layers(nn.Module):
    """One of each: a convolution, a linear layer, a one-wide one, an embedding, attention, experts."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 6, (3, 2), padding=(1, 0))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.linear = nn.Linear(6, 5)
        self.narrow = nn.Linear(5, 1)
        self.experts = Experts()

    def forward(self, ids):
        x = self.words(ids)
        x = x + self.conv(x[:, None, :, :2]).squeeze(-1).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = self.experts(x)
        x = self.linear(x)
        return x + self.narrow(x)


class Experts(nn.Module):
    """Three experts with two fused parameters, in the two orders that PEFT knows alike."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6) / 3)
        self.down = nn.Parameter(torch.randn(3, 6, 8) / 3)

    def forward(self, x):
        inner = torch.einsum("bti,eoi->bteo", x, self.up).relu()
        return x + torch.einsum("bteo,eio->bti", inner, self.down)


def net():
    set_seed(0)
    return Layers().eval()


IDS = torch.arange(10).view(2, 5)
ALL = {
    "target_modules": ["words", "conv", "attention", "linear", "narrow"],
    "target_parameters": ["experts.up", "experts.down"],
}


def trained(build, folder, *, decay=0.3, **fields):
    """A saved adapter with random factors whose singular values fall, at different speeds by module."""
    model = get_peft_model(build(), LoraConfig(**{"r": 4, "lora_alpha": 8} | fields))
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) / 3)
            if "lora_B" in name or "lora_embedding_B" in name:
                speed = decay ** (torch.arange(parameter.shape[1]) * (1 + place % 3) / 4)
                parameter.mul_(speed.view(1, -1, *[1] * (parameter.ndim - 2)) * 2)
    model.save_pretrained(folder)
    return model.eval()


def loaded(build, folder):
    return PeftModel.from_pretrained(build(), str(folder)).eval()


def deltas(model):
    """ΔW of every adapted module or parameter, by the names the base gives them."""
    found = {}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}) or "default" in getattr(
            module, "lora_embedding_A", {}
        ):
            found[f"{name}:{getattr(module, 'parameter_name', '')}"] = module.get_delta_weight(
                "default"
            ).detach()
    return found


def truncated(delta, rank):
    """The closest matrix of a rank, by a dense SVD."""
    matrices = delta.double().flatten(1)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).view(delta.shape)


@pytest.fixture
def every_layer(tmp_path):
    return trained(net, tmp_path / "in", **ALL), tmp_path / "in", tmp_path / "out"


def test_nothing_is_lost_at_full_energy_and_stock_peft_computes_the_same(every_layer):
    model, folder, out = every_layer
    done = shrink_adapter(folder, out, energy=1.0)
    assert done.ranks["narrow"] == 1  # one output has room for one singular value
    assert done.ranks["linear"] == 4
    assert done.tensor_difference <= 1e-6
    torch.testing.assert_close(loaded(net, out)(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["linear", "conv", "words", "attention", "narrow"])
def test_each_kind_of_layer_becomes_its_best_approximation(tmp_path, start):
    model = trained(net, tmp_path / "in", target_modules=[start])
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", mean_rank=2)
    assert done.after.parameters <= done.before.parameters / 2
    new, old = deltas(loaded(net, tmp_path / "out")), deltas(model)
    assert new.keys() == old.keys()
    for name, delta in new.items():
        module = name.rpartition(":")[0].removeprefix("base_model.model.")
        kept = done.ranks[module]
        expected = truncated(old[name], kept)
        if start != "attention":  # its halves share a rank, filled up with zeros
            torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-5)


def test_fused_experts_are_cut_by_slots_after_a_rotation_of_each_expert(tmp_path):
    parameters = {"target_modules": [], "target_parameters": ALL["target_parameters"]}
    model = trained(net, tmp_path / "in", **parameters)
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", mean_rank=2)
    assert set(done.ranks.values()) == {2}  # both parameters of a module share a rank
    old, new = deltas(model), deltas(loaded(net, tmp_path / "out"))
    for name, delta in new.items():
        for expert, best in zip(delta, old[name], strict=True):
            torch.testing.assert_close(expert.double(), truncated(best, 2), rtol=0, atol=1e-5)


def test_both_halves_of_attention_share_a_rank_and_each_is_its_own_best(tmp_path):
    model = trained(net, tmp_path / "in", target_modules=["attention"])
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", method="sv_ratio", value=2.0)
    assert len(set(done.ranks.values())) == 1
    old, new = deltas(model), deltas(loaded(net, tmp_path / "out"))
    for name, delta in new.items():
        s = torch.linalg.svdvals(old[name].double())
        best = truncated(old[name], int((s >= s[0] / 2).sum()))
        torch.testing.assert_close(delta.double(), best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_logits_are_those_of_the_truncated_updates(tmp_path, build):
    model = trained(build, tmp_path / "in", target_modules="all-linear")
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", mean_rank=0.6)
    assert 0 in done.ranks.values()
    with torch.no_grad():
        for name, rank in done.ranks.items():
            layer = model.get_submodule(f"base_model.model.{name}")
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            u, s, vt = torch.linalg.svd((b @ a).double(), full_matrices=False)
            a.zero_()[:rank] = vt[:rank]
            b.zero_()[:, :rank] = u[:, :rank] * s[:rank]
    ids = torch.arange(1, 9).view(1, 8)
    logits = loaded(build, tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)


def test_modules_of_rank_0_are_excluded_and_scalings_stay(tmp_path):
    fields = {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"k_proj": 2, "layers.1.v_proj": 3},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    }
    model = trained(tiny_llama, tmp_path / "in", **fields)
    _zero(tmp_path / "in", "layers.0.self_attn.q_proj")
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", energy=0.9)
    dead = [name for name, rank in done.ranks.items() if rank == 0]
    assert "model.layers.0.self_attn.q_proj" in dead
    assert set(done.config.exclude_modules) == set(dead)
    assert set(read(tmp_path / "out").pruned) == set(dead)  # for a later uniform export
    again = loaded(tiny_llama, tmp_path / "out")
    old, new = (
        {n: m.scaling["default"] for n, m in net.named_modules() if hasattr(m, "lora_A")}
        for net in (model, again)
    )
    assert len(new) == len(old) - len(dead)
    assert all(value == pytest.approx(old[name]) for name, value in new.items())
    assert all(k.startswith("^model\\.layers") for k in done.config.rank_pattern)


def _zero(folder, part):
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if part in key and ("lora_B" in key or "lora_embedding_B" in key):
            tensor.zero_()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_dropped_module_whose_name_ends_another_is_still_told_apart(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"q": nn.Linear(4, 4)})

        def forward(self, x):
            return self.q(x) + self.inner["q"](x)

    trained(Two, tmp_path / "in", target_modules=["q"])
    _zero(tmp_path / "in", "model.q.")
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", energy=1.0)
    assert done.ranks == {"inner.q": 4, "q": 0}
    again = loaded(Two, tmp_path / "out")
    assert [n for n, m in again.named_modules() if hasattr(m, "lora_A")] == [
        "base_model.model.inner.q"
    ]


def test_uniform_pads_every_module_to_the_largest_kept_rank(every_layer):
    _, folder, out = every_layer
    ragged = shrink_adapter(folder, energy=0.8)
    done = shrink_adapter(folder, out, energy=0.8, uniform=True)
    assert set(done.ranks.values()) == {ragged.after.max_rank}
    assert not done.config.rank_pattern
    assert done.after.num_bytes > ragged.after.num_bytes
    loaded(net, out)(IDS)


def test_energy_keeps_the_fewest_parameters_and_wide_modules_pay(tmp_path):
    widths = nn.ModuleDict({"wide": nn.Linear(64, 64), "slim": nn.Linear(4, 4)})
    folder = tmp_path / "in"
    model = get_peft_model(widths, LoraConfig(r=2, target_modules=["wide", "slim"]))
    with torch.no_grad():
        for name, size in ("wide", 64), ("slim", 4):
            layer = getattr(model.base_model.model, name)
            layer.lora_A["default"].weight.copy_(torch.eye(2, size))
            layer.lora_B["default"].weight.copy_(torch.eye(size, 2))
    model.save_pretrained(folder)
    assert shrink_adapter(folder, energy=0.5).ranks == {"slim": 2, "wide": 0}
    assert shrink_adapter(folder, energy=0.5, per_module=True).ranks == {"slim": 1, "wide": 1}
    assert shrink_adapter(folder, energy=0.75).ranks == {"slim": 2, "wide": 1}


@pytest.mark.parametrize(
    ("method", "value", "rank"),
    [
        ("sv_ratio", 1.0, 1),
        ("sv_ratio", 4.0, 3),
        ("sv_ratio", 3.99, 2),
        ("sv_fro", 0.8, 1),  # 8 / sqrt(85) = 0.868
        ("sv_fro", 0.95, 2),  # sqrt(80 / 85) = 0.970
        ("sv_fro", 0.98, 3),
        ("sv_cumulative", 0.5, 1),  # 8 / 15
        ("sv_cumulative", 0.8, 2),  # 12 / 15, exactly
        ("sv_cumulative", 0.81, 3),
    ],
)
def test_kohyas_rules_mean_what_they_mean_in_kohyas_resize(tmp_path, method, value, rank):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(6, 6)

    model = get_peft_model(One(), LoraConfig(r=4, target_modules=["q"]))
    with torch.no_grad():
        layer = model.base_model.model.q
        layer.lora_A["default"].weight.copy_(torch.eye(4, 6))
        layer.lora_B["default"].weight.copy_(torch.eye(6, 4) * torch.tensor([8.0, 4, 2, 1]))
    model.save_pretrained(tmp_path / "in")
    assert shrink_adapter(tmp_path / "in", method=method, value=value).ranks == {"q": rank}


def test_mean_rank_and_size_are_never_exceeded_and_the_size_is_the_files(every_layer):
    _, folder, out = every_layer
    done = shrink_adapter(folder, mean_rank=1.7)
    assert done.after.mean_rank <= 1.7
    target = done.before.num_bytes * 0.7 / 1e6
    done = shrink_adapter(folder, out, size_mb=target)
    written = (out / WEIGHTS).stat().st_size
    assert written == done.after.num_bytes <= target * 1e6
    assert written > 0.9 * target * 1e6


@saves_biases_of_layers
def test_heads_biases_and_tokens_pass_untouched_and_keep_their_modules(tmp_path):
    fields = {
        "target_modules": ["query", "value"], "modules_to_save": ["classifier"],
        "bias": "lora_only", "task_type": "SEQ_CLS",
    }  # fmt: skip
    trained(tiny_bert, tmp_path / "in", **fields)
    _zero(tmp_path / "in", "layer.0.attention.self.query")
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", energy=0.9)
    assert min(done.ranks.values()) == 1  # each has a trained bias
    old, new = load_file(tmp_path / "in" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    beside = {key for key in old if "lora_" not in key}
    assert beside == {key for key in new if "lora_" not in key}
    assert all(torch.equal(old[key], new[key]) for key in beside)
    loaded(tiny_bert, tmp_path / "out")


def test_trainable_tokens_pass_untouched(tmp_path):
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    trained(tiny_llama, tmp_path / "in", **fields)
    shrink_adapter(tmp_path / "in", tmp_path / "out", mean_rank=2)
    new = load_file(tmp_path / "out" / WEIGHTS)
    assert any("trainable_tokens" in key for key in new)
    loaded(tiny_llama, tmp_path / "out")


def test_half_precision_stays_and_is_verified_within_its_rounding(tmp_path):
    trained(tiny_llama, tmp_path / "in", target_modules="all-linear")
    tensors = {k: t.bfloat16() for k, t in load_file(tmp_path / "in" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "in" / WEIGHTS, metadata={"format": "pt"})
    done = shrink_adapter(tmp_path / "in", tmp_path / "out", mean_rank=2)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    assert 0 < done.tensor_difference < 0.01


def test_the_printed_config_evaluates_to_the_written_one(every_layer):
    _, folder, out = every_layer
    done = shrink_adapter(folder, out, energy=0.8)
    made = eval(done.config_source, {"LoraConfig": LoraConfig})  # noqa: S307  # the claim itself
    stored = PeftConfig.from_pretrained(str(out))
    filled_in = ("inference_mode", "base_model_name_or_path", "auto_mapping", "revision")
    assert {k: v for k, v in made.to_dict().items() if k not in filled_in} == {
        k: v for k, v in stored.to_dict().items() if k not in filled_in
    }
    again = get_peft_model(net(), made)
    assert {n: p.shape for n, p in again.named_parameters() if "lora_" in n} == {
        n: p.shape for n, p in loaded(net, out).named_parameters() if "lora_" in n
    }


def test_a_second_cut_of_what_came_out_works(every_layer):
    _, folder, out = every_layer
    first = shrink_adapter(folder, out, energy=0.9)
    second = shrink_adapter(out, out.with_name("twice"), energy=0.9)
    assert second.after.num_bytes < first.after.num_bytes
    loaded(net, out.with_name("twice"))(IDS)


def test_without_a_rule_there_are_tables_and_nothing_is_written(every_layer):
    _, folder, _ = every_layer
    before = sorted(folder.parent.rglob("*"))
    done = shrink_adapter(folder)
    assert done.after is None
    assert done.conclusion == ""
    sizes = [size.num_bytes for _, size in done.energies]
    assert sizes == sorted(sizes)
    assert list(done.equal_ranks) == [1, 2]
    assert sorted(folder.parent.rglob("*")) == before


def test_an_interrupted_write_leaves_nothing(every_layer, monkeypatch):
    _, folder, out = every_layer

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynlora.shrink.shrink.verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shrink_adapter(folder, out, energy=0.9)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["in"]


def test_a_file_that_reads_back_differently_is_refused_and_leaves_nothing(every_layer, monkeypatch):
    _, folder, out = every_layer

    def damaging(path, *arguments):
        write_adapter(path, *arguments)
        tensors = load_file(path / WEIGHTS)
        tensors["base_model.model.linear.lora_A.weight"][0, 0] += 1e-3
        save_file(tensors, path / WEIGHTS)

    monkeypatch.setattr("dynlora.shrink.shrink.write_adapter", damaging)
    with pytest.raises(RuntimeError, match=r"module 'linear' read back differs by"):
        shrink_adapter(folder, out, energy=0.9)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 0.0}, r"energy=0.0 must be above 0 and at most 1"),
        ({"energy": 95.0}, r"energy=95.0 must be above 0 and at most 1"),
        ({"energy": 0.9, "mean_rank": 2}, r"energy and mean_rank were given; each decides alone"),
        ({"per_module": True}, r"per_module goes with energy"),
        ({"method": "sv_fro"}, r"method and value go together"),
        ({"method": "sv_fro", "value": 1.5}, r"value=1.5 must be above 0"),
        ({"method": "sv_ratio", "value": 0.5}, r"must be 1 or more"),
        ({"method": "sv_other", "value": 0.5}, r"none of sv_ratio, sv_fro, sv_cumulative"),
        ({"mean_rank": 1e-9}, r"mean_rank=1e-09 is too small"),
        ({"size_mb": 1e-9}, r"size_mb=1e-09 is too small"),
        ({"out": "new"}, r"no rule what to keep"),
        ({"tolerance": 0.1}, r"tolerance needs the base and held-out texts"),
        ({"tolerance": 0.1, "model": "x"}, r"tolerance needs the base and held-out texts"),
        ({"tolerance": -0.1, "model": "x", "data": "y.csv"}, r"tolerance=-0.1 must be 0 or more"),
        ({"tolerance": 1, "model": "x", "data": "y.csv"}, r"tolerance=1 must be .* and below 1"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(every_layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        shrink_adapter(every_layer[1], **arguments)


def test_an_existing_folder_is_never_written_over(every_layer):
    _, folder, out = every_layer
    with pytest.raises(FileExistsError, match="is the adapter itself"):
        shrink_adapter(folder, folder, energy=0.9)
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        shrink_adapter(folder, out, energy=0.9)


def _edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"trained with use_dora.*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, r"path_initial_model_for_weight_conversion"),
        ({"peft_type": "LOHA"}, r"an adapter of method LOHA; only LoRA"),
        ({"peft_type": "DYNLORA"}, r"dynlora export"),
        ({"r": 7}, r"module '.*' has rank 4, but adapter_config.json says 7"),
        ({"rank_pattern": {"linear": 2}}, r"module 'linear' has rank 4, but .* says 2"),
        ({"alpha_pattern": {"experts.up": 2}}, r"Give all parameters of a module one rank"),
        ({"target_parameters": ["experts.up"]}, r"holds the adapters of 2 parameters"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_a_way_out(every_layer, changes, message):
    _edit(every_layer[1], **changes)
    with pytest.raises(ValueError, match=message):
        shrink_adapter(every_layer[1], energy=0.9)


def test_an_orthogonal_start_leaves_the_base_as_it_is_and_is_cut(every_layer):
    _, folder, out = every_layer
    _edit(folder, init_lora_weights="orthogonal")
    assert shrink_adapter(folder, out, energy=0.9).config.init_lora_weights is True


def test_where_only_bare_parameters_are_left_no_module_is_targeted(every_layer):
    _, folder, out = every_layer
    for part in ("words", "conv", "attention", "linear", "narrow"):
        _zero(folder, f".{part}.")
    done = shrink_adapter(folder, out, energy=1.0)
    assert {name.split(".")[0] for name, rank in done.ranks.items() if rank} == {"experts"}
    assert not done.config.target_modules
    assert {n.split(":")[0] for n in deltas(loaded(net, out))} == {
        "base_model.model.experts", "base_model.model.experts.base_layer"
    }  # fmt: skip


def test_tensors_that_are_not_understood_are_refused(every_layer):
    folder = every_layer[1]
    whole = load_file(folder / WEIGHTS)
    for part in ("linear.lora_magnitude_vector", "vera_lambda_b", "linear.lora_c"):
        key = f"base_model.model.{part}"
        save_file(whole | {key: torch.ones(3)}, folder / WEIGHTS)
        with pytest.raises(ValueError, match=rf"holds '{key}', which is neither"):
            shrink_adapter(folder, energy=0.9)
    part = {k: t for k, t in whole.items() if k != "base_model.model.linear.lora_B.weight"}
    save_file(part, folder / WEIGHTS)
    with pytest.raises(ValueError, match="module 'linear' has no lora_B"):
        shrink_adapter(folder, energy=0.9)


def test_broken_files_are_named(every_layer):
    folder = every_layer[1]
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.linear.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        shrink_adapter(folder, energy=0.9)
    (folder / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        shrink_adapter(folder, energy=0.9)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        shrink_adapter(folder, energy=0.9)


def test_an_untrained_adapter_and_a_grouped_convolution_are_refused(tmp_path):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

    config = LoraConfig(r=4, target_modules=["linear"])
    get_peft_model(net(), config).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="every B A is 0"):
        shrink_adapter(tmp_path / "new", energy=0.9)
    with pytest.warns(UserWarning, match="groups > 1"):
        trained(Grouped, tmp_path / "grouped", target_modules=["conv"])
    with pytest.raises(ValueError, match="a grouped convolution"):
        shrink_adapter(tmp_path / "grouped", energy=0.9)
