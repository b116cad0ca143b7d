"""Ranks while they form, as numbers in the logs of Trainer: TensorBoard, W&B and trackio show them."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from dynlora.allocator import RankAllocator

PREFIX = "dynlora/"

RankImage = Callable[[Mapping[str, int]], Any]
"""From ranks by module name to an image, uint8 of shape (height, width, 3)."""


def live_fields(allocator: RankAllocator) -> dict[str, float]:
    """What is logged: mean rank, live components, cost against budget, and how many came back."""
    live = sum(allocator.ranks().values())
    fields = {
        "mean_rank": live / len(allocator.modules),
        "live_components": live,
        "cost": allocator.cost,
        "budget": allocator.budget,
        "revived": sum(event["revived"] for event in allocator.history),
    }
    return {PREFIX + name: value for name, value in fields.items()}


class LiveLogs(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Adds ``live_fields`` to each training log, and shows a rank map at prune events.

    Trainer hands its logs to the reporters of ``report_to`` before it does to a user's callbacks, so
    this one stands before them all; DynLoraCallback puts it there.

    Args:
        allocator: the allocator of the run.
        rank_image: draws the ranks for TensorBoard; None draws nothing.
    """

    def __init__(self, allocator: RankAllocator, rank_image: RankImage | None = None) -> None:
        self.allocator = allocator
        self.rank_image = rank_image
        self.handler: CallbackHandler | None = None
        self._drawn = len(allocator.history)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """After a prune event, show the ranks in TensorBoard if it is among the reporters."""
        new, self._drawn = self.allocator.history[self._drawn :], len(self.allocator.history)
        if self.rank_image is None or self.handler is None:
            return
        writers = [getattr(callback, "tb_writer", None) for callback in self.handler.callbacks]
        for event in new:
            for writer in filter(None, writers):
                image = self.rank_image(event["ranks"])
                writer.add_image(f"{PREFIX}ranks", image, event["step"], dataformats="HWC")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Extend the log of a training step, where it is shown and where it is kept."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        fields = live_fields(self.allocator)
        logs.update(fields)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(fields)


def put_first(live: LiveLogs, handler: CallbackHandler | None) -> None:
    """Put ``live`` before a Trainer's callbacks, in place of an earlier run's; None leaves it out."""
    live.handler = handler
    if handler is not None:  # a new list: the handler may be going through the old one
        handler.callbacks = [live, *(c for c in handler.callbacks if not isinstance(c, LiveLogs))]
