"""DEM as a loss term, for loops that want it in the loss instead of the gradient."""

from collections.abc import Sequence

from torch import Tensor, nn

from dynlora.adapter.components import GatedLayer, find_config, find_gated_layers
from dynlora.adapter.sharding import whole
from dynlora.allocation import dem_penalty


def dem_loss(model: nn.Module, adapter: str | None = None) -> Tensor:
    """The penalty of Eq. 10 on a model's DynLora adapter, with gradient.

    R = (1/n) Σᵢ (Var(aᵢ) + Var(bᵢ)), n = components in the model

    RankAllocator already adds η·∂R to the gradients; to add ``eta * dem_loss(model)`` to the loss
    yourself, set ``dem_weight=0`` in the config.

    Args:
        model: a model with a DynLora adapter.
        adapter: which one; may be left out if there is one, or one that is trainable.

    Returns:
        A scalar, 0 or more.
    """
    adapter, _ = find_config(model, adapter)
    return dem_of([m for m in find_gated_layers(model, adapter) if not m.is_dropped])


def dem_of(layers: Sequence[GatedLayer]) -> Tensor:
    """The penalty over the components of ``layers``, none of which may be dropped."""
    vectors = []
    for gated in layers:
        a, b, _ = (whole(parameter) for parameter in gated.parameters)
        vectors += [a.flatten(1), b.transpose(0, 1).flatten(1)]
    return dem_penalty(vectors, max(1, sum(m.num_components for m in layers)))
