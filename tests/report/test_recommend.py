"""The config that a report prints reproduces the run: its ranks, scalings, targets and heads."""

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from dynlora.adapter_files.python_source import as_python
from dynlora.lora.configs import recorded_fields
from dynlora.report.recommend import as_axolotl, ranks_by_kind, same_ranks
from tiny_models import tiny_bert, tiny_llama

KINDS = {"attention.self.query": 3, "attention.output.dense": 2, "output.dense": 4}


def evaluated(fields):
    return eval(as_python(fields), {"LoraConfig": LoraConfig})  # noqa: S307  # our own text


def adapted(build, config):
    """Rank and scaling by module of a model with this config."""
    model = get_peft_model(build(), config).get_base_model()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12},
        {"target_modules": r".*\.(q|k|v)_proj", "lora_alpha": 12, "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\.self_attn\.q_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_the_exact_config_gives_each_module_its_rank_and_the_runs_scaling(fields):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.1, **fields)
    started = adapted(tiny_llama, config)
    ranks = {n: max(0, rank - i % 3) for i, (n, (rank, _)) in enumerate(started.items())}
    ranks[next(iter(ranks))] = 0 if len(ranks) > 1 else 1
    printed = evaluated(same_ranks(ranks, recorded_fields(config)))
    found = adapted(tiny_llama, printed)
    assert {n: rank for n, (rank, _) in found.items()} == {n: r for n, r in ranks.items() if r}
    for name, (_, scaling) in found.items():
        assert scaling == pytest.approx(started[name][1], rel=1e-9)
    assert printed.task_type == "CAUSAL_LM"
    assert printed.lora_dropout == 0.1
    assert printed.modules_to_save == config.modules_to_save


def test_ranks_by_kind_are_those_of_each_kind_in_peft():
    """``output.dense`` is the end of ``attention.output.dense``, and each keeps its own rank."""
    ranks = {f"bert.encoder.layer.{i}.{kind}": r for i in range(2) for kind, r in KINDS.items()}
    lora = {"r": 6, "lora_alpha": 9, "task_type": "SEQ_CLS", "target_modules": ["query", "dense"]}
    lora["exclude_modules"] = ["intermediate.dense", "pooler.dense"]
    printed = evaluated(ranks_by_kind(ranks, lora))
    found = adapted(tiny_bert, printed)
    assert found == {n: (rank, 1.5) for n, rank in ranks.items()}
    assert printed.task_type == "SEQ_CLS"


def test_a_kind_of_rank_zero_is_left_out_even_where_its_name_ends_like_another():
    wanted = {"attention.output.dense": 0, "output.dense": 4}
    ranks = {f"bert.encoder.layer.{i}.{kind}": r for i in range(2) for kind, r in wanted.items()}
    found = adapted(tiny_bert, evaluated(ranks_by_kind(ranks, {})))
    assert set(found) == {name for name, rank in ranks.items() if rank}


@pytest.mark.parametrize(
    ("ranks", "lora"),
    [
        ({"l.0.a": 2, "l.1.a": 2, "l.1.b": 2}, {}),  # b in one layer only
        ({"l.0.a": 2, "l.1.a": 2}, {"alpha_pattern": {"l.0.a": 3}}),  # two scalings
        ({"l.0.a": 2, "l.1.a": 2}, {"exclude_modules": ".*b"}),  # an expression
        ({"l.0.a": 0, "l.1.a": 0, "l.0.b": 0, "l.1.b": 1}, {}),  # every mean rounds to 0
    ],
)
def test_kinds_are_left_alone_where_they_cannot_say_what_was_adapted(ranks, lora):
    assert ranks_by_kind(ranks, {"r": 4, "lora_alpha": 4, **lora}) is None


def test_axolotl_reads_the_same_fields_as_yaml():
    lora = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q", "v"]}
    fields = same_ranks({"m.layers.0.q": 3, "m.layers.0.v": 0, "m.layers.1.q": 4}, lora)
    read = yaml.safe_load(as_axolotl(fields | {"bias": "all"}))
    assert read["adapter"] == "lora"
    assert (read["lora_r"], read["lora_alpha"]) == (4, 8)
    assert read["lora_rank_pattern"] == fields["rank_pattern"] == {r"^m\.layers\.0\.q": 3}
    assert read["lora_alpha_pattern"] == {r"^m\.layers\.0\.q": 6}
    assert read["lora_exclude_modules"] == ["m.layers.0.v"]
    assert as_axolotl(fields | {"bias": "all"}).endswith("# not in axolotl: bias")
