"""Whether the saved progress of a run belongs to the run that is about to go on."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dynlora.lora.components import LoraComponents

STATE_VERSION = 2
KEPT_SETTINGS = (
    "target_r", "min_r", "prune_start", "prune_end", "prune_interval", "ema_beta", "budget", "revival",
    "dem_weight",
)  # fmt: skip
"""Settings that must not change between the parts of one run."""

_SAME_SCALING = 1e-6
"""Relative; a scaling rebuilt as alpha / rank may differ from the first one in its last bit."""


def saved_scores(modules: Sequence[LoraComponents]) -> dict[str, Any]:
    """Scores and masks by module name, plain numbers; fp32 values survive JSON exactly."""
    return {m.name: {"ema": m.ema.tolist(), "live": m.live.tolist()} for m in modules}


def check_state(state: Mapping[str, Any], contract: Mapping[str, Any]) -> None:
    """Refuse a state that is damaged, another version's, or made for another plan, with a ValueError.

    Args:
        state: what ``RankAllocator.state_dict`` wrote, perhaps through JSON and a disk.
        contract: what must not change between the parts of one run, ``modules`` (name -> scaling)
            included.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise ValueError(
            f"state={reprlib.repr(state)} does not come from RankAllocator.state_dict(). Pass what that "
            "returned, or resume from another checkpoint."
        )
    if state["version"] != STATE_VERSION:
        raise ValueError(
            f"state has version {state['version']!r}, but this dynlora reads version {STATE_VERSION}. "
            "Resume with the dynlora that wrote it, or start a new run."
        )
    _check_form(state, contract)
    for name, value in contract.items():
        if name == "modules":
            _check_modules(state[name], value, is_frozen=state["is_frozen"])
        elif state[name] != value:
            raise ValueError(
                f"{name}={value!r} differs from the interrupted run's {state[name]!r}: the schedule or "
                "the scores would change during the run. Resume with the same settings, or start a new run."
            )


def restore_scores_(state: Mapping[str, Any], modules: Sequence[LoraComponents]) -> None:
    """Give the modules the scores and masks of ``state``; ValueError if they have other ranks there."""
    for module in modules:
        saved = state["scores"].get(module.name)
        if not isinstance(saved, dict) or not {"ema", "live"} <= saved.keys():
            raise ValueError(
                f"state holds no scores of module {module.name!r}: the file is damaged. Resume from "
                "another checkpoint."
            )
        if len(saved["ema"]) != module.rank or len(saved["live"]) != module.rank:
            raise ValueError(
                f"module {module.name!r} has rank {module.rank}, but in the interrupted run it had "
                f"{len(saved['ema'])}: load the adapter weights of that run's checkpoint first. A Trainer "
                "must be given the callback when it is built, callbacks=[DynLoraCallback(...)]; in a loop "
                "of your own, build the RankAllocator before model.load_state_dict(...)."
            )
        ema = torch.tensor(saved["ema"], dtype=module.ema.dtype)
        if not bool(torch.isfinite(ema).all()):
            raise ValueError(
                f"state holds scores of module {module.name!r} that are not finite: the checkpoint was "
                "written after its run had failed. Resume from an earlier one."
            )
        module.ema = ema.to(module.ema.device)
        module.live = torch.tensor(saved["live"], dtype=torch.bool, device=module.live.device)


def _check_form(state: Mapping[str, Any], contract: Mapping[str, Any]) -> None:
    forms = {"step": int, "is_frozen": bool, "window": list, "history": list, "scores": dict}
    for name, form in {**forms, "modules": dict}.items():
        if type(state.get(name)) is not form:
            raise ValueError(
                f"state holds {name}={state.get(name)!r}, which must be of type {form.__name__}: the file "
                "is damaged. Resume from another checkpoint."
            )
    missing = sorted(contract.keys() - state.keys())
    window, steps = state["window"], contract["total_steps"]
    is_window = len(window) == 2 and all(type(t) is int for t in window) and window[0] < window[1]
    is_history = all(isinstance(event, dict) for event in state["history"])
    if missing or not is_window or not is_history or not 0 <= state["step"] <= steps:
        raise ValueError(
            f"state is damaged. It must hold a step from 0 to {steps} (here {state['step']!r}), a window "
            f"of two steps, the earlier first (here {window!r}), a history of events, and all settings "
            f"(missing: {', '.join(missing) or 'none'}). Resume from another checkpoint."
        )


def _check_modules(
    saved: Mapping[str, float | None], present: Mapping[str, float | None], *, is_frozen: bool
) -> None:
    gone, new = sorted(saved.keys() - present.keys()), sorted(present.keys() - saved.keys())
    if gone or new:
        way_out = "Resume with the same base model and target_modules."
        if is_frozen and not new:
            way_out += (
                " If the adapter was loaded from the checkpoint before, as ms-swift does, it has its final "
                "ranks already: resume without dynlora."
            )
        raise ValueError(
            f"modules differ from the interrupted run's: adapted only there are {gone[:3]}, only here "
            f"{new[:3]}. {way_out}"
        )
    for name, scaling in present.items():
        was = saved[name]
        if scaling is None or was is None:  # a module of rank 0 has none
            continue
        is_number = isinstance(was, int | float)
        if not is_number or not math.isclose(scaling, was, rel_tol=_SAME_SCALING):
            raise ValueError(
                f"scaling={scaling!r} of module {name!r} differs from the interrupted run's {was!r}: the "
                "model's outputs would change. Resume with the same r, lora_alpha, rank_pattern, "
                "alpha_pattern and use_rslora."
            )
