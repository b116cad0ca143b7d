"""The config that a report prints reproduces the run: its ranks, scalings, targets and heads."""

import pytest
from peft import LoraConfig, get_peft_model

from dynlora.lora.configs import recorded_fields
from dynlora.report.conclusion import next_config
from tiny_models import tiny_llama


def evaluated(text):
    return eval(text, {"LoraConfig": LoraConfig})  # noqa: S307  # our own text


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
    printed = evaluated(next_config(ranks, recorded_fields(config)))
    found = adapted(tiny_llama, printed)
    assert {n: rank for n, (rank, _) in found.items()} == {n: r for n, r in ranks.items() if r}
    for name, (_, scaling) in found.items():
        assert scaling == pytest.approx(started[name][1], rel=1e-9)
    assert printed.task_type == "CAUSAL_LM"
    assert printed.lora_dropout == 0.1
    assert printed.modules_to_save == config.modules_to_save
