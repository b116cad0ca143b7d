"""The equations of the method: pure functions of numbers and tensors, one equation a function.

Nothing here knows a model, a config or PEFT. ``importance`` holds Eq. 7 and 8, ``schedule`` Eq. 9,
``selection`` the choice of the survivors, ``regularizer`` Eq. 10.
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
    Schedule,
    budget_at,
    is_prune_step,
    prune_plan,
    pruning_window,
    target_components,
)
from dynlora.allocation.selection import select_components, select_within

__all__ = [
    "IMPORTANCE_EPS",
    "Schedule",
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
    "select_within",
    "smooth_importance_",
    "target_components",
    "update_norm",
]
