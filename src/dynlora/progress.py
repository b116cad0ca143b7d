"""Whether the saved progress of a run belongs to the run that is about to go on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dynlora.adapter.components import GatedLayer

STATE_VERSION = 1
KEPT_FIELDS = (
    "prune_start", "prune_end", "prune_interval", "ema_beta", "dem_weight", "revival", "importance",
    "schedule", "budget",
)  # fmt: skip
"""Fields of the config that must not change between the parts of one run."""

_SAME_SCALING = 1e-6
"""Relative; a scaling rebuilt as alpha / rank may differ from the first one in its last bit."""

_SILENT_STEPS = 3
"""With B = 0 and a warm-up from 0 the gates receive no gradient at first, so that all scores may be 0."""


def check_state(state: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse a state that is damaged, another version's, or made for another plan.

    Args:
        state: what ``RankAllocator.state_dict`` wrote, perhaps through JSON and a disk.
        plan: what must not change between the parts of one run, ``modules`` (name -> scaling) included.

    Raises:
        ValueError: it cannot be continued; the message names the field and both values.
    """
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        found = state.get("version") if isinstance(state, Mapping) else state
        raise ValueError(
            f"state has version {found!r}, this dynlora reads {STATE_VERSION}: resume "
            "with the version that wrote it."
        )
    _check_form(state, plan)
    for name, value in plan.items():
        if name == "modules":
            _check_modules(state[name], value)
        elif state[name] != value:
            raise ValueError(
                f"{name}={value!r} differs from the interrupted run's {state[name]!r}: the schedule "
                "would change under way. Resume with the same settings, or start a new run."
            )


def check_model(state: Mapping[str, Any], layers: Sequence[GatedLayer]) -> None:
    """Refuse to continue with a model whose adapter is not the one of ``state``.

    Raises:
        ValueError: its adapter has other components, or scores that are missing or not finite.
    """
    stored = sum(m.num_components for m in layers)
    if not state["is_frozen"] and stored != state["num_components"]:
        raise ValueError(
            f"model holds {stored} components, the interrupted run had {state['num_components']}: "
            "load the adapter weights of that run's checkpoint first."
        )
    live = sum(int(m.live.sum()) for m in layers)
    frozen_at = state["target_components"]
    if state["budget"] == "parameters" and state["history"]:
        frozen_at = state["history"][-1]["budget"]  # how many fit is known only then
    if state["is_frozen"] and live != frozen_at:
        raise ValueError(
            f"model holds {live} live components, the interrupted run was frozen at "
            f"{frozen_at}: load the adapter weights of that run's checkpoint first."
        )
    if state["step"] > _SILENT_STEPS and not any(bool(m.ema.any()) for m in layers):
        raise ValueError(
            "model holds no importance scores: load the checkpoint's adapter weights, with their "
            "lora_ema buffers, before the allocator's state."
        )
    bad = [m.name for m in layers if not bool(m.ema.isfinite().all())]
    if bad:
        raise ValueError(
            f"model holds importance scores that are not finite, first in module {bad[0]!r}: the "
            "checkpoint was written after its run had failed. Resume from an earlier one."
        )


def _check_form(state: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    forms = {"step": int, "is_frozen": bool, "num_components": int, "window": list, "history": list}
    for name, form in {**forms, "modules": dict}.items():
        if not isinstance(state.get(name), form) or (form is int and isinstance(state[name], bool)):
            raise ValueError(
                f"state holds {name}={state.get(name)!r}, no {form.__name__}: the file is damaged. "
                "Resume from another checkpoint."
            )
    missing = sorted(plan.keys() - state.keys())
    window = state["window"]
    is_window = len(window) == 2 and all(type(t) is int for t in window) and window[0] < window[1]
    is_history = all(isinstance(event, dict) for event in state["history"])
    if missing or not is_window or not is_history or not 0 <= state["step"] <= plan["total_steps"]:
        raise ValueError(
            f"state is damaged: step={state['step']!r} of {plan['total_steps']}, window={window!r}, "
            f"missing {missing}. Resume from another checkpoint."
        )


def _check_modules(saved: Mapping[str, float | None], present: Mapping[str, float | None]) -> None:
    gone, new = sorted(saved.keys() - present.keys()), sorted(present.keys() - saved.keys())
    if gone or new:
        raise ValueError(
            f"modules differ from the interrupted run's: {gone[:3]} were adapted there and are not here, "
            f"{new[:3]} are new. Resume with the same base model and target_modules."
        )
    for name, scaling in present.items():
        was = saved[name]
        if scaling is None or was is None:  # a module of rank 0 has none
            continue
        if not isinstance(was, int | float) or not math.isclose(
            scaling, was, rel_tol=_SAME_SCALING
        ):
            raise ValueError(
                f"scaling={scaling!r} of module {name!r} differs from the interrupted run's {was!r}: the "
                "function would jump. Resume with the same lora_alpha, init_r, rank_pattern and use_rslora."
            )
