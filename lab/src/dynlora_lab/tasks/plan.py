"""``--dry-run``: what a run would do, from its data and the shapes of its model; no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynlora_lab.methods.adapted import is_in_head
from dynlora_lab.tasks.data import Splits
from dynlora_lab.tasks.recipe import Recipe
from dynlora_lab.tasks.run import build_model, checked_data
from dynlora_lab.tasks.training import planned_steps, training_arguments

BYTES = {"float32": 4.0, "auto": 4.0, "bfloat16": 2.0, "float16": 2.0}
TRAINED_BYTES = 16  # weight, gradient and AdamW's two moments in fp32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        recipe: resolved, plain values.
        train_rows: rows to train on.
        eval_rows: rows to measure on, by set.
        steps: optimizer steps.
        components_start: of all modules; 0 for a method without any.
        schedule: (step, budget from then on), the first at step 0, in the unit of ``adapter.budget``; []
            for a method that prunes nothing.
        parameters: by kind: base, head, adapter_start.
        memory_bytes: weights, gradients and optimizer state at the start; no activations, which
            depend on the lengths of the rows.
        notes: lines on the rows for the user.
    """

    recipe: dict[str, Any]
    train_rows: int
    eval_rows: Mapping[str, int]
    steps: int
    components_start: int
    schedule: list[tuple[int, int]]
    parameters: Mapping[str, int]
    memory_bytes: int
    notes: Sequence[str]


def plan(recipe: Recipe, splits: Splits | None = None) -> Plan:
    """Read and check the data, build the model without weights, and count.

    Raises:
        RecipeError: the recipe or its data is unfit.
    """
    data = checked_data(recipe, splits)
    arguments = training_arguments(recipe)
    prepared, adapted = build_model(recipe, data, is_skeleton=True)
    rows = 0 if arguments.max_steps > 0 else recipe.family.rows_trained(prepared, arguments)
    steps = planned_steps(arguments, rows)
    trained, base, head = _counted(adapted.model, prepared.head)
    quantization = recipe.base.quantization or {}
    base_bytes = BYTES[recipe.base.dtype]
    if quantization:
        base_bytes = 0.5 if quantization.get("load_in_4bit") else 1.0
    return Plan(
        recipe=recipe.to_dict(),
        train_rows=len(data.train),
        eval_rows={name: len(rows) for name, rows in data.evals.items()},
        steps=steps,
        components_start=sum(adapted.ranks().values()),
        schedule=adapted.schedule(steps) if adapted.schedule else [],
        parameters={"base": base, "head": head, "adapter_start": adapted.parameters()},
        memory_bytes=int(base * base_bytes + trained * TRAINED_BYTES),
        notes=list(data.notes),
    )


def _counted(model: nn.Module, head: list[str]) -> tuple[int, int, int]:
    """Trainable, frozen, and trainable head parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    in_head = sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and is_in_head(n, head)
    )
    return trained, frozen, in_head
