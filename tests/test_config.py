"""DynLoraConfig: defaults, what it refuses and how it says so, and its round trip through JSON."""

import copy

import pytest
from peft import LoraConfig, PeftConfig

from dynlora import DynLoraConfig


def test_defaults_are_the_promised_ones():
    config = DynLoraConfig()
    promised = {
        "init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "prune_start": 0.15,
        "prune_end": 0.5, "prune_interval": 10, "ema_beta": 0.9, "dem_weight": 0.0, "revival": True,
        "compact": True, "total_steps": None, "init_std": None,
        "init": "lora", "importance": "sensitivity",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in promised} == promised
    assert config.peft_type == "DYNLORA"
    assert isinstance(config, LoraConfig)


@pytest.mark.parametrize(("target", "initial"), [(1, 2), (2, 3), (8, 12), (0.5, 1), (2.5, 4)])
def test_init_r_is_one_and_a_half_times_target_r(target, initial):
    assert DynLoraConfig(target_r=target).init_r == initial
    assert DynLoraConfig(target_r=target).r == initial


def test_equal_ranks_are_legal():
    assert DynLoraConfig(init_r=4, target_r=4).init_r == 4


REFUSED = [
    ({"r": 8}, r"r=8 must not be given.*Set target_r"),
    ({"init_r": 4}, r"target_r=8 must not exceed init_r=4.*Lower target_r, raise init_r"),
    ({"target_r": 0}, r"target_r=0 must be a number above 0"),
    ({"target_r": -1}, r"target_r=-1 must be a number above 0"),
    ({"target_r": "8"}, r"target_r='8' must be a number above 0"),
    ({"target_r": float("nan")}, r"target_r=nan must be a number above 0"),
    ({"init_r": 8.5}, r"init_r=8.5 must be an integer of at least 1"),
    ({"init_r": 0, "target_r": 0.5}, r"init_r=0 must be an integer of at least 1"),
    ({"init_r": True, "target_r": 0.5}, r"init_r=True must be an integer"),
    ({"prune_start": 0.6}, r"prune_start=0.6, prune_end=0.5 must satisfy"),
    ({"prune_start": 0.5}, r"prune_start=0.5, prune_end=0.5 must satisfy"),
    ({"prune_start": -0.1}, r"prune_start=-0.1.* must satisfy"),
    ({"prune_end": 1.1}, r"prune_end=1.1 must satisfy"),
    ({"prune_interval": 0}, r"prune_interval=0 must be an integer of at least 1"),
    ({"prune_interval": 2.5}, r"prune_interval=2.5 must be an integer"),
    ({"ema_beta": 1.0}, r"ema_beta=1.0 must lie in \[0, 1\)"),
    ({"dem_weight": -0.1}, r"dem_weight=-0.1 must be 0 or more.*0 switches DEM off"),
    ({"total_steps": 0}, r"total_steps=0 must be an integer of at least 1"),
    ({"init_std": 0.0}, r"init_std=0.0 must be a number above 0.*or None"),
    ({"use_dora": True}, r"use_dora=True cannot be combined with dynlora: weight-decomposed"),
    ({"lora_bias": True}, r"lora_bias=True cannot be combined"),
    ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] cannot be combined"),
    ({"layer_replication": [(0, 2)]}, r"layer_replication=.* cannot be combined"),
    ({"ensure_weight_tying": True}, r"ensure_weight_tying=True cannot be combined"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' must be True or False.*init_std"),
    ({"init_lora_weights": "gaussian"}, r"init_lora_weights='gaussian' must be True or False"),
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
