"""``dynlora inspect --config-for``: what is pasted trains the adapter's ranks, at its alpha / r."""

import shlex

import pytest
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dynlora.adapter_files.plain_config import told_fields
from dynlora.history import HistoryFile
from dynlora.report.next_run import settings_for
from tiny_models import EXPERTS, adapted, tiny_experts, tiny_llama, train

AXOLOTL = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save", "peft_use_rslora": "use_rslora",
    "lora_rank_pattern": "rank_pattern", "lora_alpha_pattern": "alpha_pattern",
    "peft_init_lora_weights": "init_lora_weights",
}  # fmt: skip
"""What axolotl 0.19.0 makes of its keys (``axolotl/loaders/adapter.py``)."""


def as_peft(text):
    return eval(text, {"LoraConfig": LoraConfig})  # noqa: S307  # our own text


def as_axolotl(text):
    """axolotl wants whole alphas; a key that it does not know it drops without a word."""
    keys = yaml.safe_load(text)
    alphas = [keys["lora_alpha"], *keys.get("lora_alpha_pattern", {}).values()]
    assert all(isinstance(alpha, int) and alpha > 0 for alpha in alphas)
    return LoraConfig(**{AXOLOTL[key]: value for key, value in keys.items()})


def as_llama_factory(text):
    keys = yaml.safe_load(text)
    assert isinstance(keys["lora_alpha"], int)
    return LoraConfig(
        r=keys["lora_rank"],
        lora_alpha=keys["lora_alpha"],
        lora_dropout=keys["lora_dropout"],
        target_modules=keys["lora_target"].split(","),
    )


def words_of(text):
    """Arguments of a shell's command by name, comments left out."""
    given = {}
    for word in shlex.split(text, comments=True):
        if word.startswith("--"):
            values = given.setdefault(word[2:], [])
        else:
            values.append(word)
    return given


def as_ms_swift(text):
    given = words_of(text)
    return LoraConfig(
        r=int(*given["lora_rank"]),
        lora_alpha=float(*given["lora_alpha"]),
        lora_dropout=float(*given["lora_dropout"]),
        target_modules=given["target_modules"],
    )


def as_kohya(text):
    """It chooses the modules itself, and multiplies by network_alpha / network_dim."""
    given = words_of(text)
    alpha, rank = float(*given["network_alpha"]), int(*given["network_dim"])
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "down_proj"])


READERS = {
    "peft": as_peft, "axolotl": as_axolotl, "llama-factory": as_llama_factory, "ms-swift": as_ms_swift,
    "kohya": as_kohya,
}  # fmt: skip


def layers_of(model):
    """Rank and scaling by module."""
    modules = model.get_base_model().named_modules()
    layers = {n: m for n, m in modules if hasattr(m, "lora_A")}
    return {n: (m.r["default"], round(m.scaling["default"], 9)) for n, m in layers.items()}


@pytest.fixture(scope="module", params=["list", "regex", "all-linear"])
def finished(request, tmp_path_factory):
    """Folder of a run's adapter, as PEFT wrote it, and what stock PEFT makes of it."""
    fields = {
        "list": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1},
        "regex": {"target_modules": r".*\.(q|k|v)_proj"},
        "all-linear": {},
    }[request.param]
    folder = tmp_path_factory.mktemp("run")
    model = adapted(tiny_llama, task_type="CAUSAL_LM", **fields)
    ranks = train(model, total_steps=12).ranks()
    assert {0, 4} & set(ranks.values()) == {0, 4}
    model.save_pretrained(folder)
    return folder, layers_of(PeftModel.from_pretrained(tiny_llama(), folder))


@pytest.mark.parametrize("framework", ["peft", "axolotl"])
def test_patterns_give_every_module_its_rank_and_scaling(finished, framework):
    folder, layers = finished
    text = settings_for(framework, folder)
    found = READERS[framework](text)
    assert layers_of(get_peft_model(tiny_llama(), found)) == layers
    assert found.lora_dropout == LoraConfig.from_pretrained(folder).lora_dropout
    assert "#" not in text


@pytest.mark.parametrize("framework", ["llama-factory", "ms-swift", "kohya"])
def test_one_rank_covers_every_module_at_the_runs_scaling(finished, framework):
    folder, layers = finished
    text = settings_for(framework, folder)
    found = layers_of(get_peft_model(tiny_llama(), READERS[framework](text)))
    ((rank, scaling),) = set(found.values())
    assert {scaling} == {scaling for _, scaling in layers.values()}
    assert rank == max(rank for rank, _ in layers.values())
    if framework != "kohya":
        assert found.keys() == layers.keys()
    assert "# One rank for all modules, the largest; for exactly these ranks" in text


def test_what_is_left_out_is_said(tmp_path):
    fields = {"modules_to_save": ["lm_head"], "bias": "all", "target_modules": ["q_proj"]}
    adapted(tiny_llama, **fields, use_dora=True).save_pretrained(tmp_path)
    assert "# Left out: bias\n" in settings_for("axolotl", tmp_path)
    assert yaml.safe_load(settings_for("axolotl", tmp_path))["lora_modules_to_save"] == ["lm_head"]
    assert yaml.safe_load(settings_for("llama-factory", tmp_path))["additional_target"] == "lm_head"
    assert words_of(settings_for("ms-swift", tmp_path))["lora_bias"] == ["all"]
    assert words_of(settings_for("ms-swift", tmp_path))["use_dora"] == ["True"]
    unsaid = "# Left out: bias, modules_to_save, target_modules, use_dora\n"
    assert unsaid in settings_for("kohya", tmp_path)


@pytest.mark.parametrize("framework", READERS)
def test_rank_stabilised_scaling_stays(tmp_path, framework):
    fields = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 2}}
    targets = ["q_proj", "v_proj", "down_proj"]
    model = adapted(tiny_llama, use_rslora=True, lora_alpha=4, target_modules=targets, **fields)
    model.save_pretrained(tmp_path)
    found = get_peft_model(tiny_llama(), READERS[framework](settings_for(framework, tmp_path)))
    assert {scaling for _, scaling in layers_of(found).values()} == {2.0}
    assert (layers_of(found) == layers_of(model)) == (framework in {"peft", "axolotl"})


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT looks at modules only
def test_fused_experts_keep_their_ranks(tmp_path):
    pattern = {"gate_up_proj": 3, "down_proj": 3}
    fields = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": pattern}
    adapted(tiny_experts, **fields, alpha_pattern=dict.fromkeys(pattern, 6)).save_pretrained(
        tmp_path
    )
    layers = layers_of(PeftModel.from_pretrained(tiny_experts(), tmp_path))
    assert sorted(layers.values()) == [(3, 2.0), (3, 2.0), (4, 2.0)]
    found = as_axolotl(settings_for("axolotl", tmp_path))
    assert layers_of(get_peft_model(tiny_experts(), found)) == layers


def test_nothing_is_said_of_peft_defaults():
    assert told_fields(LoraConfig().to_dict()) == {"r": 8, "lora_alpha": 8}
    assert told_fields({"init_lora_weights": False}) == {"init_lora_weights": False}


@pytest.mark.parametrize(
    ("framework", "fields", "message"),
    [
        ("axolotl", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 1.5}},
         r"axolotl takes whole numbers as alpha, and the scaling needs \[1.5\]; for exactly these"),
        ("llama-factory", {"r": 3, "lora_alpha": 1.5}, r"llama-factory takes whole .* needs \[1.5\]"),
        ("ms-swift", {"alpha_pattern": {"q_proj": 6}},
         "modules have scalings from 1 to 1.5, and ms-swift has one alpha for all; for exactly these"),
    ],
)  # fmt: skip
def test_what_a_framework_cannot_be_told_is_refused_with_the_way_out(
    tmp_path, framework, fields, message
):
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 4, **fields}
    adapted(tiny_llama, **fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        settings_for(framework, tmp_path)
    assert as_peft(settings_for("peft", tmp_path)).lora_alpha == fields["lora_alpha"]


def test_an_adapter_with_gates_is_sent_to_export(tmp_path):
    adapted(tiny_llama, gated=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the kind native.* dynlora export writes one"):
        settings_for("axolotl", tmp_path)


def test_a_list_that_would_name_a_pruned_module_as_well_is_refused(tmp_path):
    """PEFT takes a name in the list for the end of a longer one."""
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "deep": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    config = LoraConfig(target_modules=["a"], exclude_modules=["deep.a"])
    get_peft_model(net, config).save_pretrained(tmp_path)
    ranks = {"a": 8, "deep.a": 8}
    HistoryFile(tmp_path).append({"event": "start", "step": 0, "time": 0.0, "ranks": ranks})
    with pytest.raises(ValueError, match="a list of names cannot leave out 'deep.a'.* for exactly"):
        settings_for("axolotl", tmp_path)
