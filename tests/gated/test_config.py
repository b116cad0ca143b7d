"""DynLoraConfig: defaults, what it refuses and how it says so, and its round trip through JSON."""

import copy
import dataclasses

import pytest
from peft import LoraConfig, PeftConfig

from dynlora import DynLoraConfig
from wrong_settings import REFUSED as SETTINGS_REFUSED


def test_defaults_are_the_promised_ones():
    config = DynLoraConfig()
    promised = {
        "init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "prune_start": 0.15,
        "prune_end": None, "prune_interval": 10, "ema_beta": 0.9, "dem_weight": 0.0, "revival": False,
        "compact": True, "total_steps": None, "init_std": None, "min_r": 0, "budget": "parameters",
        "init": "lora", "importance": "sensitivity",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in promised} == promised
    assert config.peft_type == "DYNLORA"
    assert isinstance(config, LoraConfig)


@pytest.mark.parametrize(
    ("target", "initial"), [(1, 2), (2, 3), (8, 12), (0.5, 1), (2.5, 4), ("auto", 16)]
)
def test_init_r_is_one_and_a_half_times_target_r(target, initial):
    assert DynLoraConfig(target_r=target).init_r == initial
    assert DynLoraConfig(target_r=target).r == initial


def test_equal_ranks_are_legal():
    assert DynLoraConfig(init_r=4, target_r=4, r=4).init_r == 4


def test_a_config_can_be_made_from_another():
    assert dataclasses.replace(DynLoraConfig(target_r=4), target_r=2).target_r == 2


def test_the_paper_preset_fills_what_is_left_out_and_nothing_else():
    config = DynLoraConfig(target_r=2, preset="paper", dem_weight=0.5, lora_dropout=0.0)
    assert (config.lora_dropout, config.lora_alpha, config.init_r) == (0.0, 8, 3)
    assert (config.importance, config.budget, config.init) == ("share", "components", "kaiming")
    assert (config.dem_weight, config.revival) == (0.5, True)


OWN = [
    ({"r": 8}, r"r=8 differs from init_r=12. Leave r out"),
    ({"init_r": 4}, r"target_r=8 must not exceed init_r=4.*Lower target_r, raise init_r"),
    ({"init_r": 8.5}, r"init_r=8.5 must be an integer of at least 1"),
    ({"init_r": 0, "target_r": 0.5}, r"init_r=0 must be an integer of at least 1"),
    ({"init_r": True, "target_r": 0.5}, r"init_r=True must be an integer"),
    ({"init": "kaiming-lora"}, r"init='kaiming-lora' must be one of 'kaiming', 'lora'"),
    ({"init_std": 0.0}, r"init_std=0.0 must be a number above 0.*or None"),
    ({"preset": "best"}, r"preset='best' must be 'paper' or None"),
    ({"rank_pattern": {"q": -1}}, r"rank_pattern=\{'q': -1\} must hold integers of at least 1"),
    ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\]=0 must be a number above 0"),
    ({"lora_alpha": 0}, r"lora_alpha=0 must be a number above 0"),
    ({"lora_dropout": 1}, r"lora_dropout=1 must be a number in"),
    ({"use_dora": True}, r"use_dora=True cannot be combined with rank alloc.*weight-decomposed"),
    ({"lora_bias": True}, r"lora_bias=True cannot be combined"),
    ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] cannot be combined with gates"),
    ({"megatron_config": {"a": 1}}, r"megatron_config=.* cannot be combined with gates"),
    ({"layer_replication": [(0, 2)]}, r"layer_replication=.* cannot be combined"),
    ({"ensure_weight_tying": True}, r"ensure_weight_tying=True cannot be combined"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' must be True or False.*init_std"),
]
REFUSED = [
    *OWN,
    *((fields, message) for fields, message in SETTINGS_REFUSED if "min_r" not in fields),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_wrong_values_are_refused_with_a_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        DynLoraConfig(**fields)


def test_a_rank_pattern_may_raise_the_initial_rank_above_init_r():
    config = DynLoraConfig(init_r=4, target_r=6, rank_pattern={"q_proj": 16})
    assert config.target_r == 6


def test_json_round_trip_keeps_every_field(tmp_path):
    config = DynLoraConfig(target_r=2.5, target_modules=["a", "b"], init_std=0.02, total_steps=7)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, DynLoraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.r == config.r == 4


def test_deep_copies_are_equal():
    config = DynLoraConfig(target_r=3)
    assert copy.deepcopy(config) == config
