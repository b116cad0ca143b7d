"""What a method may look at before training: the first batches, and their gradients through a LoRA."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dynlora.lora.components import Factor, LoraComponents, find_components
from dynlora_lab.methods.adapted import Target

BATCHES = 8
"""Batches that are looked at, as in PEFT's example of LoRA-GA and in FIM-LoRA."""


def first_batches(target: Target, count: int = BATCHES) -> Iterator[Mapping[str, Tensor]]:
    """The first batches of the training rows."""
    return islice(target.batches(), count)


@contextmanager
def temporary_lora(
    model: nn.Module, fields: Mapping[str, Any], *, rank: int
) -> Iterator[list[LoraComponents]]:
    """A LoRA of scaling 1 and no dropout in ``model``, which has none before and afterwards.

    Gradients with respect to its factors are products of the adapted weight's gradient, which is itself
    never needed: that of 4-bit weights could not be had.

    Args:
        model: the base, changed in place.
        fields: of LoraConfig; only ``target_modules`` and ``exclude_modules`` are used.
        rank: in every module.
    """
    places = {name: fields[name] for name in ("target_modules", "exclude_modules")}
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **places))
    try:
        yield find_components(adapted, "default")
    finally:
        adapted.unload()


def gradient_of(factor: Factor) -> Tensor:
    """The gradient of a factor, zeros where the loss does not depend on its module."""
    parameter = factor.parameter
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
