"""What a method makes of a base model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that a method adapts.

    Attributes:
        model: the base with its head; the method may change it in place.
        head: names of the modules with newly drawn weights: trained fully whatever the method, never
            adapted, not counted.
        task_type: PEFT's task type, or None.
        seed: of the run.
        batches: makes batches of the training rows, as the Trainer does, on the device of the model.
    """

    model: nn.Module
    head: list[str]
    task_type: str | None
    seed: int
    batches: Callable[[], Iterable[Mapping[str, Tensor]]] = tuple


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A model ready to train.

    Attributes:
        model: what the Trainer gets.
        parameters: parameters of the adapter now, without the head; asked for before and after
            training.
        callbacks: of the Trainer, in this order.
        finish: called once after training and before the last evaluation.
        ranks: rank by module name, zeros included; {} for a method without ranks.
        schedule: budget after so many steps of a run with so many, the first after none: [(step, cost)],
            in the unit of ``adapter.budget``; None for a method that prunes nothing.
        fits_from: (steps of the run) -> first step whose model is within the final budget.
        save: writes what was trained to a folder; None leaves it to ``Trainer.save_model``.
        can_resume: whether a run can go on from a checkpoint.
        optimizer: (arguments of the Trainer) -> the optimizer; None for the one that they name.
        cuts: called once everything is measured and saved: puts one smaller adapter after the other into
            the model, each to be measured too, and says what it is.
    """

    model: nn.Module
    parameters: Callable[[], int]
    callbacks: list[TrainerCallback] = field(default_factory=list)
    finish: Callable[[], None] = lambda: None
    ranks: Callable[[], dict[str, int]] = dict
    schedule: Callable[[int], list[tuple[int, int]]] | None = None
    fits_from: Callable[[int], int] = lambda _total_steps: 1
    save: Callable[[Path], object] | None = None
    can_resume: bool = True
    optimizer: Callable[[TrainingArguments], Optimizer] | None = None
    cuts: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())


def trainable_beside(model: nn.Module, head: list[str]) -> int:
    """Trainable parameters that belong to no module of ``head``."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and not is_in_head(name, head)
    )


def is_in_head(name: str, head: list[str]) -> bool:
    """Whether the parameter ``name``, with or without PEFT's prefix, lies in a module of ``head``."""
    return any(f".{module}." in f".{name}" for module in head)


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Freeze every parameter but those whose name is ``chosen``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
