"""Hold pruned components at 0 from step to step, without asking the device which they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynlora.lora.components import Factor, LoraComponents
from dynlora.lora.sharding import (
    distribute_like,
    full_shape,
    is_zero_parameter,
    scale_all_,
)


class Masks:
    """One mask for each tensor that must stay 0 where a component is pruned.

    Args:
        modules: with ``live`` masks; reading them once waits for the device.
    """

    @torch.no_grad()
    def __init__(self, modules: Sequence[LoraComponents]) -> None:
        dead = [m for m in modules if not m.is_dropped and not bool(m.live.all())]
        self._held = [(factor, _mask(m, factor)) for m in dead for factor in m.switches]

    @torch.no_grad()
    def apply_(self) -> None:
        """Set pruned components to 0."""
        if self._held:
            scale_all_([f.parameter for f, _ in self._held], [mask for _, mask in self._held])


def _mask(module: LoraComponents, factor: Factor) -> Tensor:
    """1 where a component is alive, 0 where it is pruned.

    On an accelerator it has the parameter's whole shape: a foreach product of unlike shapes would launch
    one kernel for each tensor.
    """
    parameter = factor.parameter
    alive = factor.by_component(module.live.to(parameter.device)).to(parameter.dtype)
    full = full_shape(parameter)
    shape = [1] * len(full)
    shape[factor.dim] = len(alive)
    mask = alive.view(shape)
    if parameter.device.type != "cpu" or type(parameter) is not torch.nn.Parameter:
        mask = mask.expand(full).contiguous()
    return mask if is_zero_parameter(parameter) else distribute_like(mask, parameter)
