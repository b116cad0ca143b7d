"""The Trainer of a run: its arguments, its data order, and metrics that know their evaluation set."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dynlora_lab.methods import Adapted
from dynlora_lab.tasks.family import Family, Prepared
from dynlora_lab.tasks.recipe import Recipe
from dynlora_lab.tasks.typed_fields import RecipeError


class NamedEvaluation:
    """Mixed into a Trainer: ``compute_metrics`` is told which evaluation set it measures.

    Attributes:
        metrics_of: (name, prediction) -> metrics, or None.
    """

    metrics_of: Any = None

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        """Rows in their order even where training groups them by length: metrics look rows up."""
        return SequentialSampler(eval_dataset)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, which calls itself with the name of each set of several."""
        name = eval_dataset if isinstance(eval_dataset, str) else ""
        if self.metrics_of is not None:
            self.compute_metrics = partial(self.metrics_of, name)
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]  # of the Trainer


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The trainer's arguments: ours, then the family's, then the recipe's.

    Raises:
        RecipeError: they contradict one another.
    """
    family = recipe.family
    ours: dict[str, Any] = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "eval_on_start": True,
        "logging_steps": 10,
        "logging_first_step": True,  # a loss to show from the start
        "warmup_steps": 0.06,  # a share of the run, as in the paper's code
        "weight_decay": 0.01,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    fixed = {
        "output_dir": str(recipe.output),
        "seed": recipe.seed,
        "data_seed": recipe.seed,  # else the order depends on what a method drew before
        "disable_tqdm": True,
    }
    fields = {**ours, **family.defaults(recipe.options), **recipe.training, **fixed}
    if fields.get("load_best_model_at_end"):  # else Trainer keeps the best checkpoint, not the last
        fields.setdefault("metric_for_best_model", metric_key(family, recipe))
        fields.setdefault("greater_is_better", family.is_better_higher(recipe.options))
    try:
        return family.arguments(**fields)
    except ValueError as error:
        raise RecipeError(f"training: {error}") from error


def make_trainer(
    recipe: Recipe,
    prepared: Prepared,
    adapted: Adapted,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The family's Trainer on the method's model, silent but for ``callbacks``."""
    family = recipe.family
    trainer_class = type("RunTrainer", (NamedEvaluation, family.trainer), {})
    evals = dict(prepared.evals)
    options = dict(prepared.trainer_options)
    if prepared.collator is not None:
        options["data_collator"] = prepared.collator
    if adapted.optimizer is not None:
        adapted.model.to(arguments.device)
        options["optimizers"] = (adapted.optimizer(arguments), None)
    trainer: Trainer = trainer_class(
        adapted.model,
        arguments,
        train_dataset=prepared.train,
        eval_dataset=evals[""] if list(evals) == [""] else evals,
        processing_class=prepared.processor,
        compute_metrics=prepared.compute_metrics and partial(prepared.compute_metrics, ""),
        callbacks=[*adapted.callbacks, *callbacks],
        **options,
    )
    trainer.metrics_of = prepared.compute_metrics
    if not family.counts_tokens:
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


def metric_key(family: Family, recipe: Recipe) -> str:
    """The Trainer's name of the metric that chooses the best: of the first evaluation set if named."""
    metric = family.best_metric(recipe.options)
    evals = recipe.data.evals
    first = next(iter(evals)) if isinstance(evals, dict) else ""
    return f"eval_{first}_{metric}" if first else f"eval_{metric}"


def planned_steps(arguments: TrainingArguments, num_rows: int) -> int:
    """Optimizer steps of a run over ``num_rows`` rows, as Trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batch = arguments.train_batch_size * arguments.world_size
    rounding = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = rounding(num_rows / batch)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)


def evaluations(history: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics by step from the Trainer's log; several sets of one step are one entry."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        measured = {k: v for k, v in entry.items() if k.startswith("eval_")}
        if measured:
            by_step.setdefault(entry["step"], {"step": entry["step"]}).update(
                {"epoch": entry.get("epoch"), **measured}
            )
    return list(by_step.values())
