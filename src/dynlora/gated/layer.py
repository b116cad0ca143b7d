"""Gates inside PEFT's LoRA layers: y = W x + s · B (c ⊙ A x).

The gate c is a parameter of ``lora_A[adapter]``, whose output a forward hook multiplies by it, so every
backend that computes ``lora_B(lora_A(dropout(x))) * scaling`` works unmodified. Classes stay PEFT's.
"""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dynlora._private import stand_in
from dynlora.lora.components import Factor, LoraComponents, pair_of


class GatedComponents(LoraComponents):
    """The components of one gated layer: A, B and the gate c."""

    is_gated = True

    @property
    def gate_factor(self) -> Factor:
        """Where c is."""
        return Factor(self.layer, "lora_A", self.adapter, "c", 0)

    @property
    def gate(self) -> nn.Parameter:
        """The gate c, (rank,)."""
        return self.gate_factor.parameter

    @property
    def factors(self) -> list[Factor]:
        """A, B and c."""
        return [*self.pairs[0], self.gate_factor]

    @property
    def sized(self) -> list[Factor]:
        """A and B: c is folded into B in the end."""
        return [] if self.is_dropped else list(self.pairs[0])

    @property
    def probes(self) -> list[Factor]:
        """The gate: its product with its gradient is the sensitivity, and pruned components have 0."""
        return [self.gate_factor]

    switches = probes

    def drop_(self) -> list[nn.Parameter]:
        """As for a stock LoRA; the module stays known, as one of rank 0."""
        gone = super().drop_()
        self.layer.components_of[self.adapter] = GatedComponents
        return gone

    def restore_(self, rank: int, alpha: float, config: LoraConfig) -> None:
        """As for a stock LoRA, with its gate."""
        super().restore_(rank, alpha, config)
        attach_gate_(self.layer, self.adapter, config)


def attach_gate_(layer: Any, adapter: str, config: Any) -> nn.Parameter:
    """Give ``adapter`` of a stock LoRA layer its gate, which is returned, and draw A and B anew.

    Args:
        layer: a LoRA layer that holds ``adapter``.
        adapter: name of the adapter.
        config: its DynLoraConfig, which says how it starts.
    """
    if not hasattr(layer, "components_of"):
        layer.components_of = {}
        # what PEFT's delete_adapter empties
        layer.other_param_names = (*layer.other_param_names, "components_of")
        layer.get_delta_weight = partial(_delta_weight, layer)
    a, b = (factor.parameter for factor in pair_of(layer, adapter))
    gate = nn.Parameter(torch.zeros(a.shape[0], dtype=a.dtype, device=a.device))
    gate.requires_grad_(a.requires_grad)
    layer.lora_A[adapter].c = gate
    layer.lora_A[adapter].gate_hook = layer.lora_A[adapter].register_forward_hook(_times_gate)
    layer.components_of[adapter] = GatedComponents
    with torch.no_grad():
        if config.init_lora_weights is False or (config.init_std is None and config.init == "lora"):
            gate.fill_(1.0)  # A and B stay as PEFT has drawn them
        elif config.init_std is None:
            for factor in (a, b):
                nn.init.kaiming_uniform_(factor, a=0)  # the official code's a
        else:
            for factor in (a, b):
                nn.init.normal_(factor, std=config.init_std)
    return gate


def detach_gate_(layer: Any, adapter: str) -> None:
    """Take the gate of ``adapter`` off; the last one leaves a layer that is all PEFT's."""
    if adapter in layer.lora_A:
        layer.lora_A[adapter].gate_hook.remove()
        del layer.lora_A[adapter].c, layer.lora_A[adapter].gate_hook
    del layer.components_of[adapter]
    if not layer.components_of:
        layer.other_param_names = tuple(n for n in layer.other_param_names if n != "components_of")
        del layer.components_of, layer.get_delta_weight


def _times_gate(lora_a: Any, _args: Any, z: Tensor) -> Tensor:
    """The output of a Linear or ConvNd, one channel for each component, times c."""
    c = lora_a.c.to(z.dtype)
    return z * (c if isinstance(lora_a, nn.Linear) else c.view(1, -1, *[1] * (z.ndim - 2)))


def _delta_weight(layer: Any, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
    """What PEFT merges, with c in A; with gradient."""
    stock = partial(type(layer).get_delta_weight, layer, adapter, *args, **kwargs)
    if adapter not in layer.components_of:
        return stock()
    lora_a = layer.lora_A[adapter]
    c = lora_a.c.to(lora_a.weight.dtype).view(-1, *[1] * (lora_a.weight.ndim - 1))
    with stand_in(lora_a, "weight", lora_a.weight * c):
        return stock()
