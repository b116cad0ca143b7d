"""The held-out loss of a Trainer's model, for ``target_r="auto"``."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from dynlora._private import calling_self, prepared_inputs


def held_out_loss(trainer: Trainer, batches: int) -> Callable[[], float]:
    """A function that returns the mean loss of the first batches of the Trainer's evaluation set.

    It is the loss that the Trainer itself computes, in evaluation mode, on batches of
    ``per_device_eval_batch_size``; no random number is drawn from the run's generators. Of several sets
    by name, the first is used.
    """
    if hasattr(trainer, "reward_funcs"):
        raise ValueError(
            f"target_r='auto' compares held-out losses, and {type(trainer).__name__} trains by reward: its "
            "loss says nothing of the model. Set target_r to a number, or run `dynlora shrink` on what "
            "comes out."
        )
    data = trainer.eval_dataset
    if data is None:
        raise ValueError(
            "target_r='auto' needs held-out data: pass eval_dataset to the Trainer, or evaluate=..., a "
            "function that returns the held-out loss. Put some rows of the training data aside for it."
        )
    if isinstance(data, dict):
        data = next(iter(data.values()))
    loader = trainer.get_eval_dataloader(data)

    def loss() -> float:
        model = trainer.model
        was_training = model.training
        model.eval()
        losses = []
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            for inputs in itertools.islice(loader, batches):
                prepared = prepared_inputs(trainer, inputs)
                with trainer.compute_loss_context_manager():
                    losses.append(trainer.compute_loss(model, prepared).float())
        model.train(was_training)
        if not losses:
            raise ValueError("target_r='auto' needs held-out data: the eval_dataset is empty.")
        return float(torch.stack(losses).mean())

    return loss


def known_evaluate(
    given: Callable[[], float] | None, target_r: Any, batches: int
) -> Callable[[], float] | None:
    """The held-out loss to use: the user's function, the Trainer's, or None where nobody asks."""
    if target_r != "auto" or given is not None:
        return given
    trainer = calling_self(Trainer)
    return None if trainer is None else held_out_loss(trainer, batches)
