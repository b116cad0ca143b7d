"""Settings: the promised defaults, the paper's values, and every rule with its message."""

import dataclasses

import pytest

from dynlora.allocation import PAPER, Settings, settings_from
from wrong_settings import REFUSED

KNOBS = {
    "target_r": 8, "tolerance": 0.003, "min_r": 0, "prune_start": 0.15, "prune_end": 0.5,
    "prune_interval": 10, "ema_beta": 0.9, "importance": "sensitivity", "budget": "parameters",
    "revival": False, "dem_weight": 0.0, "compact": True, "total_steps": None,
}  # fmt: skip


def test_defaults_are_the_promised_ones():
    assert dataclasses.asdict(Settings(target_r=8)) == KNOBS
    auto = dataclasses.asdict(Settings(target_r="auto"))
    assert auto == KNOBS | {"target_r": "auto", "prune_end": 1.0}


def test_the_paper_preset_fills_what_is_left_out_and_nothing_else():
    given = {"target_r": 2, "dem_weight": 0.0, "revival": False}
    settings = settings_from(given, preset="paper", where="DynLoraCallback")
    assert dataclasses.asdict(settings) == KNOBS | PAPER | given
    assert (settings.importance, settings.budget) == ("share", "components")


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
        ({"xyz": 8}, TypeError, r"no argument 'xyz'. The settings are target_r, tolerance"),
        ({"min_r": 1}, ValueError, r"target_r is missing: .* such as target_r=8"),
    ],
)  # fmt: skip
def test_a_name_that_is_unknown_or_missing_is_told(given, error, message):
    with pytest.raises(error, match=message):
        settings_from(given, where="DynLoraCallback")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset='papers' must be 'paper' or None"):
        settings_from({"target_r": 8}, preset="papers", where="DynLoraCallback")
