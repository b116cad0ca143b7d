"""The equations of the method: pure functions of numbers and tensors, one equation a function.

Nothing here knows a model, a config or PEFT. ``importance`` holds Eq. 7 and 8, ``schedule`` Eq. 9,
``selection`` the choice of the survivors, ``regularizer`` Eq. 10, ``settings`` the knobs of a run.
"""

from dynlora.allocation.importance import (
    IMPORTANCE_EPS,
    component_importance,
    component_norms,
    component_products,
    component_sensitivities,
    smooth_importance_,
    update_norm,
)
from dynlora.allocation.regularizer import add_dem_gradients_, dem_penalty
from dynlora.allocation.schedule import (
    budget_at,
    is_prune_step,
    prune_plan,
    pruning_window,
    target_cost,
)
from dynlora.allocation.selection import select_components
from dynlora.allocation.settings import PAPER, Budget, Importance, Settings, settings_from

__all__ = [
    "IMPORTANCE_EPS",
    "PAPER",
    "Budget",
    "Importance",
    "Settings",
    "add_dem_gradients_",
    "budget_at",
    "component_importance",
    "component_norms",
    "component_products",
    "component_sensitivities",
    "dem_penalty",
    "is_prune_step",
    "prune_plan",
    "pruning_window",
    "select_components",
    "settings_from",
    "smooth_importance_",
    "target_cost",
    "update_norm",
]
