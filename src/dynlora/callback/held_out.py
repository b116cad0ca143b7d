"""The held-out loss of a Trainer's model, for ``target_r="auto"``."""

import itertools
from collections.abc import Callable, Iterator, Mapping
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

        The batches of the loss, in parts of ``per_device_train_batch_size`` rows where rows can be told
        apart, so that they need no more memory than a step of training.
        """
        trainer = self._trainer
        scaler = trainer.accelerator.scaler  # of fp16, where small gradients would be 0 without it
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        size = trainer.args.per_device_train_batch_size
        try:
            with self._evaluating(has_checkpoints=True), torch.enable_grad():
                for inputs in itertools.islice(self._loader, self._batches):
                    for part in _parts(inputs, size):
                        for parameter in parameters:
                            parameter.grad = None
                        loss = self._loss(part)
                        (loss if scaler is None else scaler.scale(loss)).backward()
                        yield
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    @contextmanager
    def _evaluating(self, *, has_checkpoints: bool = False) -> Iterator[None]:
        """The model in evaluation mode, and the run's random numbers as they were.

        With ``has_checkpoints``, layers that recompute activations in training do so here too; those that
        call dropout as a function of their own, as BART's do, have it meanwhile.
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


def _parts(inputs: Any, size: int) -> list[Any]:
    """A batch in parts of so many rows; whole, if its entries are not all tensors of as many rows."""
    if not isinstance(inputs, Mapping) or not all(
        isinstance(v, Tensor) and v.dim() for v in inputs.values()
    ):
        return [inputs]
    lengths = {len(value) for value in inputs.values()}
    if len(lengths) != 1:
        return [inputs]
    starts = range(0, lengths.pop(), size)
    return [{key: value[i : i + size] for key, value in inputs.items()} for i in starts]


def known_evaluate(
    given: Callable[[], float] | None, target_r: Any, batches: int
) -> Callable[[], float] | None:
    """The held-out loss to use: the user's function, the Trainer's, or None where nobody asks."""
    if target_r != "auto" or given is not None:
        return given
    trainer = calling_self(Trainer)
    return None if trainer is None else HeldOutLoss(trainer, batches)
