"""Settings: the promised defaults, the paper's values, and every rule with its message."""

import dataclasses

import pytest

from dynlora.allocation import PAPER, Settings, settings_from

KNOBS = {
    "target_r": 8, "min_r": 0, "prune_start": 0.15, "prune_end": 0.5, "prune_interval": 10,
    "ema_beta": 0.9, "importance": "sensitivity", "budget": "parameters", "revival": False,
    "dem_weight": 0.0, "compact": True, "total_steps": None,
}  # fmt: skip


def test_defaults_are_the_promised_ones():
    assert dataclasses.asdict(Settings(target_r=8)) == KNOBS


def test_the_paper_preset_fills_what_is_left_out_and_nothing_else():
    given = {"target_r": 2, "dem_weight": 0.0, "revival": False}
    settings = settings_from(given, preset="paper", where="DynLoraCallback")
    assert dataclasses.asdict(settings) == KNOBS | PAPER | given
    assert (settings.importance, settings.budget) == ("share", "components")


REFUSED = [
    ({"target_r": 0}, r"target_r=0 must be a number above 0"),
    ({"target_r": -1}, r"target_r=-1 must be a number above 0"),
    ({"target_r": "8"}, r"target_r='8' must be a number above 0"),
    ({"target_r": True}, r"target_r=True must be a number above 0"),
    ({"target_r": float("nan")}, r"target_r=nan must be a number above 0"),
    ({"target_r": float("inf")}, r"target_r=inf must be a number above 0"),
    ({"min_r": 9}, r"min_r=9 must be an integer from 0 to target_r=8"),
    ({"min_r": -1}, r"min_r=-1 must be an integer from 0"),
    ({"min_r": 0.5}, r"min_r=0.5 must be an integer from 0"),
    ({"prune_start": 0.6}, r"prune_start=0.6, prune_end=0.5 must satisfy"),
    ({"prune_start": 0.5}, r"prune_start=0.5, prune_end=0.5 must satisfy"),
    ({"prune_start": -0.1}, r"prune_start=-0.1.* must satisfy"),
    ({"prune_end": 1.1}, r"prune_end=1.1 must satisfy"),
    ({"prune_interval": 0}, r"prune_interval=0 must be an integer of at least 1"),
    ({"prune_interval": 2.5}, r"prune_interval=2.5 must be an integer"),
    ({"ema_beta": 1.0}, r"ema_beta=1.0 must lie in \[0, 1\)"),
    ({"ema_beta": -0.1}, r"ema_beta=-0.1 must lie in \[0, 1\)"),
    ({"dem_weight": -0.1}, r"dem_weight=-0.1 must be 0 or more.*0 switches DEM off"),
    ({"total_steps": 0}, r"total_steps=0 must be an integer of at least 1"),
    ({"total_steps": 2.0}, r"total_steps=2.0 must be an integer of at least 1"),
    ({"importance": "best"}, r"importance='best' must be one of 'sensitivity', 'share', 'norm'"),
    ({"budget": "best"}, r"budget='best' must be one of 'parameters', 'components'"),
    ({"revival": 1}, r"revival=1 must be True or False"),
    ({"compact": "no"}, r"compact='no' must be True or False"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_wrong_values_are_refused_with_a_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        settings_from({"target_r": 8, **fields}, where="DynLoraCallback")


def test_the_borders_are_legal():
    Settings(target_r=0.5)
    Settings(target_r=3, min_r=3, prune_start=0, prune_end=1, ema_beta=0, total_steps=1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"targetr": 8}, TypeError, r"DynLoraCallback has no argument 'targetr'. Did you mean target_r\?"),
        ({"xyz": 8}, TypeError, r"no argument 'xyz'. It takes target_r, min_r"),
        ({"min_r": 1}, ValueError, r"needs target_r, .* such as DynLoraCallback\(target_r=8\)"),
    ],
)  # fmt: skip
def test_a_name_that_is_unknown_or_missing_is_told(given, error, message):
    with pytest.raises(error, match=message):
        settings_from(given, where="DynLoraCallback")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset='papers' must be 'paper' or None"):
        settings_from({"target_r": 8}, preset="papers", where="DynLoraCallback")
