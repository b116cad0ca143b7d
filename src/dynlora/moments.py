"""What the optimizer remembers of pruned components, forgotten on request."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynlora.adapter.components import RANK_DIMS, GatedLayer
from dynlora.adapter.sharding import laid_out


@torch.no_grad()
def forget_pruned_(layers: Sequence[GatedLayer], optimizer: Optimizer) -> None:
    """Set the optimizer state of pruned components to 0, in place.

    With Adam the momentum of a cut gate moves it at the very next step, and its old second moment
    makes that step small or large for reasons that ended with the cut. Forgotten, a component comes
    back through its gradient alone. Only state tensors of a parameter's own shape are touched.

    Args:
        layers: gated layers whose ``live`` masks say what is pruned.
        optimizer: the optimizer that holds their parameters.
    """
    for gated in layers:
        if gated.is_dropped or bool(gated.live.all()):
            continue
        for parameter, dim in zip(gated.parameters, RANK_DIMS, strict=True):
            shape = [1] * parameter.ndim
            shape[dim] = len(gated.live)
            mask = gated.live.view(shape).expand(parameter.shape)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(laid_out(mask, value))
