"""One run of a recipe: read, check, adapt, train, measure, save, record."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import prepare_model_for_kbit_training
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from dynlora import export_lora
from dynlora.lora.components import configs_of, find_components, is_lora
from dynlora_lab.methods import METHODS, Adapted, Target
from dynlora_lab.methods.adapted import is_in_head
from dynlora_lab.tasks.base_model import BaseModel
from dynlora_lab.tasks.data import Splits, read_splits
from dynlora_lab.tasks.family import Prepared, TaskData
from dynlora_lab.tasks.interrupt import Interrupted, StopOnInterrupt
from dynlora_lab.tasks.model_card import write_card
from dynlora_lab.tasks.offline import offline_model, weights_sha256
from dynlora_lab.tasks.progress import Listener, TellListener
from dynlora_lab.tasks.provenance import machine, source_commit, versions
from dynlora_lab.tasks.recipe import Recipe
from dynlora_lab.tasks.run_files import (
    DONE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    checkpoint_to_resume,
    claim_folder,
    clear_folder,
    write_run,
)
from dynlora_lab.tasks.training import evaluations, make_trainer, metric_key, training_arguments
from dynlora_lab.tasks.typed_fields import RecipeError


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run.

    Attributes:
        record: the content of ``run.json``.
        trainer: as training left it, its model finalized.
        prepared: what the family gave.
    """

    record: dict[str, Any]
    trainer: Trainer
    prepared: Prepared


def run(
    recipe: Recipe,
    *,
    splits: Splits | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> RunResult:
    """Do what the recipe says and leave ``run.json``, the trained weights and a model card.

    Args:
        recipe: what to do.
        splits: rows to use instead of those that ``recipe.data`` names.
        resume: go on from the last checkpoint in ``recipe.output``.
        overwrite: replace an earlier run in ``recipe.output``.
        listener: who is told on the way.

    Raises:
        RecipeError: the recipe, its data or its folder is unfit; nothing was changed.
        Interrupted: Ctrl-C; the record says so, and ``resume`` goes on.
    """
    listener = listener or Listener()
    checkpoint, earlier = _place(recipe, resume=resume, overwrite=overwrite)
    data = checked_data(recipe, splits)
    for line in (rows_line(recipe, data), *data.notes):
        listener.announce(line)
    prepared, adapted = build_model(recipe, data)
    arguments = training_arguments(recipe)
    if not adapted.can_resume:
        _need_no_checkpoint(recipe, resume=resume)
    stop = StopOnInterrupt(can_resume=adapted.can_resume)
    tell = TellListener(listener, adapted.ranks)
    trainer = make_trainer(recipe, prepared, adapted, arguments, [tell, stop])
    record = _record(recipe, data, adapted, prepared) | {"parts": earlier.get("parts", [])}
    if earlier:
        record["budget"] = earlier["budget"]  # that of the start
    if not resume and trainer.is_world_process_zero():
        clear_folder(recipe.output)
    _write(trainer, recipe, record)
    before = prepared.known_loss and prepared.known_loss(trainer.model)
    listener.announce(f"Training with {recipe.method}")
    _train(trainer, recipe, record, stop, checkpoint)
    adapted.finish()
    listener.announce("Measuring")
    metrics = trainer.evaluate()
    if prepared.known_loss and before:
        after = prepared.known_loss(trainer.model)
        record["forgetting"] = {
            "before": before["nll"],
            "after": after["nll"],
            "tokens": before["tokens"],
        }
    _save(trainer, recipe, adapted)
    _conclude(recipe, record, trainer, adapted, metrics)
    if cuts := [about | trainer.evaluate() for about in adapted.cuts()]:
        record["cuts"] = cuts
    if trainer.is_world_process_zero():
        prepared.written.write(recipe.output)
        write_card(recipe, record)
    _write(trainer, recipe, record)
    return RunResult(record=record, trainer=trainer, prepared=prepared)


def checked_data(recipe: Recipe, splits: Splits | None = None) -> TaskData:
    """The rows of the recipe, read and checked by its family."""
    data: TaskData = recipe.family.read(recipe.options, splits or read_splits(recipe.data))
    return data


def rows_line(recipe: Recipe, data: TaskData) -> str:
    """How many rows train and measure, for a person."""
    measured = " + ".join(f"{len(rows)} {name}".strip() for name, rows in data.evals.items())
    return f"{recipe.data.name}: {len(data.train)} rows to train on, {measured} to measure on"


def build_model(
    recipe: Recipe, data: TaskData, *, is_skeleton: bool = False
) -> tuple[Prepared, Adapted]:
    """The base with its head and the method's adapter; the same head for every method.

    Args:
        recipe: what to do.
        data: of :func:`checked_data`.
        is_skeleton: models are shapes without weights, for counting.
    """
    model = offline_model(recipe.offline_name) if recipe.offline_name else recipe.model
    base = BaseModel(name=model, load=recipe.base, is_skeleton=is_skeleton)
    base.config()  # a model that is not there is the first thing to say
    set_seed(recipe.seed)
    prepared: Prepared = recipe.family.prepare(recipe.options, data, base)
    _get_ready(prepared, recipe)
    set_seed(recipe.seed)
    target = Target(
        model=prepared.model,
        head=prepared.head,
        task_type=recipe.family.task_type,
        seed=recipe.seed,
        batches=lambda: _batches(recipe, prepared),
    )
    try:
        return prepared, METHODS[recipe.method](recipe.adapter, target)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _batches(recipe: Recipe, prepared: Prepared) -> DataLoader[Any]:
    """Batches of the training rows, as a Trainer of this recipe would give them to the model."""
    whole = Adapted(model=prepared.model, parameters=lambda: 0)
    trainer = make_trainer(recipe, prepared, whole, training_arguments(recipe), [])
    return trainer.get_train_dataloader()


def _place(recipe: Recipe, *, resume: bool, overwrite: bool) -> tuple[str | None, dict[str, Any]]:
    """The checkpoint to go on from and the record so far; None and {} for a new run."""
    if resume:
        return checkpoint_to_resume(recipe.output, recipe.to_dict())
    claim_folder(recipe.output, overwrite=overwrite)
    return None, {}


def _need_no_checkpoint(recipe: Recipe, *, resume: bool) -> None:
    """Refuse what would load a checkpoint of a method whose checkpoints do not load."""
    if resume:
        raise RecipeError(f"--resume: method {recipe.method!r} cannot go on from a checkpoint.")
    if recipe.training.get("load_best_model_at_end"):
        raise RecipeError(
            f"training.load_best_model_at_end cannot be used with method {recipe.method!r}, whose "
            "checkpoints do not load; set it to false (run.json names the best evaluation)."
        )


def _get_ready(prepared: Prepared, recipe: Recipe) -> None:
    """What quantised bases and gradient checkpointing ask for before an adapter is added."""
    checkpoints = bool(recipe.training.get("gradient_checkpointing"))
    if recipe.base.quantization and recipe.method in ("full", "bitfit"):
        raise RecipeError(
            f"method {recipe.method!r} trains the base model's weights, which base.quantization freezes; "
            "leave one of them out."
        )
    if recipe.base.quantization:
        prepare_model_for_kbit_training(prepared.model, use_gradient_checkpointing=checkpoints)
    elif checkpoints:
        prepared.model.enable_input_require_grads()


def _train(
    trainer: Trainer,
    recipe: Recipe,
    record: dict[str, Any],
    stop: StopOnInterrupt,
    checkpoint: str | None,
) -> None:
    """Train; the record knows of this part of the run whether it ends or is interrupted."""
    part = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    began = time.perf_counter()
    record["status"] = FAILED  # unless one of the next lines is reached
    try:
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint)
        record["status"] = RUNNING
    except Interrupted:
        record["status"] = INTERRUPTED
        raise
    finally:
        step = trainer.state.global_step
        record["parts"].append({**part, "train_s": time.perf_counter() - began, "step": step})
        record["evaluations"] = evaluations(trainer.state.log_history)
        _write(trainer, recipe, record)


def _record(recipe: Recipe, data: TaskData, adapted: Adapted, prepared: Prepared) -> dict[str, Any]:
    """``run.json`` as it stands when training begins."""
    ranks = adapted.ranks()
    head = sum(
        p.numel()
        for name, p in adapted.model.named_parameters()
        if p.requires_grad and is_in_head(name, prepared.head)
    )
    return {
        "status": RUNNING,
        "recipe": recipe.to_dict(),
        "versions": versions(),
        "commit": source_commit(),
        "machine": machine(),
        "seed": recipe.seed,
        "base_sha256": weights_sha256(recipe.offline_name) if recipe.offline_name else [],
        "data": {
            "labels": data.labels,
            "train_rows": len(data.train),
            "eval_rows": {name: len(rows) for name, rows in data.evals.items()},
        },
        "baselines": dict(data.baselines),
        "budget": {
            "parameters_start": adapted.parameters(),
            "components_start": sum(ranks.values()),
            "modules": len(ranks),
            "head_parameters": head,
        },
    }


def _conclude(
    recipe: Recipe,
    record: dict[str, Any],
    trainer: Trainer,
    adapted: Adapted,
    metrics: Mapping[str, float],
) -> None:
    ranks = adapted.ranks()
    record["status"] = DONE
    record["steps"] = trainer.state.global_step
    record["metrics"] = {k: v for k, v in metrics.items() if k.startswith("eval_")}
    first = adapted.fits_from(trainer.state.max_steps)
    record["best"] = _best(recipe, [e for e in record["evaluations"] if e["step"] >= first])
    record["ranks"] = ranks
    record["budget"] |= {
        "parameters_end": adapted.parameters(),
        "components_end": sum(ranks.values()),
    }
    record["train_s"] = sum(part["train_s"] for part in record["parts"])


def _best(recipe: Recipe, measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of the evaluations made within the final budget, as the paper counts, or None."""
    key = metric_key(recipe.family, recipe)
    fit = [entry for entry in measured if key in entry]
    choose = max if recipe.family.is_better_higher(recipe.options) else min
    return choose(fit, key=lambda entry: entry[key]) if fit else None


def _save(trainer: Trainer, recipe: Recipe, adapted: Adapted) -> None:
    """The trained weights and the processor, at the top of the run's folder."""
    if _is_sharded(trainer.model):
        export_lora(trainer.model, recipe.output)  # without what is pruned; every process calls
        if trainer.is_world_process_zero():
            trainer.processing_class.save_pretrained(str(recipe.output))
    elif adapted.save is None:
        trainer.save_model(str(recipe.output))
    elif trainer.is_world_process_zero():
        adapted.save(Path(recipe.output))
        trainer.processing_class.save_pretrained(str(recipe.output))


def _is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the adapter only, in which pruned components are zeros."""
    names = [name for name, config in configs_of(model).items() if is_lora(config)]
    return any(m.is_sharded for name in names for m in find_components(model, name))


def _write(trainer: Trainer, recipe: Recipe, record: Mapping[str, Any]) -> None:
    if trainer.is_world_process_zero():
        write_run(recipe.output, {**record, "metric": metric_key(recipe.family, recipe)})
