"""The held-out loss of a Trainer's model, for ``target_r="auto"``."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from dynlora._private import calling_self, prepared_inputs


class HeldOutLoss:
    """The mean loss of the first batches of the Trainer's evaluation set, and its gradients.

    It is the loss that the Trainer itself computes, in evaluation mode, on batches of
    ``per_device_eval_batch_size``; no random number is drawn from the run's generators. Of several sets
    by name, the first is used.

    Raises:
        ValueError: the Trainer trains by reward, or has no evaluation set.
    """

    def __init__(self, trainer: Trainer, batches: int) -> None:
        if hasattr(trainer, "reward_funcs"):
            raise ValueError(
                f"target_r='auto' compares held-out losses, and {type(trainer).__name__} trains by reward: "
                "its loss says nothing of the model. Set target_r to a number, or run `dynlora shrink` on "
                "what comes out."
            )
        data = trainer.eval_dataset
        if data is None:
            raise ValueError(
                "target_r='auto' needs held-out data: pass eval_dataset to the Trainer, or evaluate=..., a "
                "function that returns the held-out loss. Put some rows of the training data aside for it."
            )
        self._trainer, self._batches = trainer, batches
        self._data = next(iter(data.values())) if isinstance(data, dict) else data
        self._loader = trainer.get_eval_dataloader(self._data)

    def __call__(self) -> float:
        """The mean loss of the batches; ValueError if there is none."""
        with self._evaluating(), torch.no_grad():
            losses = [
                self._loss(inputs).float()
                for inputs in itertools.islice(self._loader, self._batches)
            ]
        if not losses:
            raise ValueError("target_r='auto' needs held-out data: the eval_dataset is empty.")
        return float(torch.stack(losses).mean())

    def backward(self) -> Iterator[None]:
        """Leave the gradients of one batch after the other in the parameters, then those from before.

        Batches are as large as those of training, so that they need no more memory, and together have the
        rows that the loss is computed on.
        """
        trainer = self._trainer
        arguments = trainer.args
        size = min(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
        batches = -(-self._batches * arguments.per_device_eval_batch_size // size)
        scaler = trainer.accelerator.scaler  # of fp16, where small gradients would be 0 without it
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        try:
            with self._evaluating(has_checkpoints=True), torch.enable_grad():
                for inputs in itertools.islice(self._loader_of(size), batches):
                    for parameter in parameters:
                        parameter.grad = None
                    loss = self._loss(inputs)
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    yield
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def _loader_of(self, size: int) -> Any:
        arguments = self._trainer.args
        whole = arguments.per_device_eval_batch_size
        arguments.per_device_eval_batch_size = size
        try:
            return self._trainer.get_eval_dataloader(self._data)
        finally:
            arguments.per_device_eval_batch_size = whole

    @contextmanager
    def _evaluating(self, *, has_checkpoints: bool = False) -> Iterator[None]:
        """The model without dropout, and the run's random numbers as they were.

        With ``has_checkpoints``, layers that recompute activations in training do so here too.
        """
        model = self._trainer.model
        was_training = model.training
        model.eval()
        for module in model.modules() if has_checkpoints else ():
            if vars(module).get("gradient_checkpointing", False):
                module.training = True  # what it holds stays in evaluation mode
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=cuda):
                yield
        finally:
            model.train(was_training)

    def _loss(self, inputs: Any) -> Tensor:
        prepared = prepared_inputs(self._trainer, inputs)
        with self._trainer.compute_loss_context_manager():
            loss: Tensor = self._trainer.compute_loss(self._trainer.model, prepared)
        return loss


def known_evaluate(
    given: Callable[[], float] | None, target_r: Any, batches: int
) -> Callable[[], float] | None:
    """The held-out loss to use: the user's function, the Trainer's, or None where nobody asks."""
    if target_r != "auto" or given is not None:
        return given
    trainer = calling_self(Trainer)
    return None if trainer is None else HeldOutLoss(trainer, batches)
