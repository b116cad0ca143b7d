"""What a run tells while it goes on: stages, steps, logs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

RANKS_EVERY_S = 1.0  # reading live ranks waits for the accelerator


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who is told.

    Attributes:
        announce: a line at the start of each stage.
        on_step: (optimizer steps done, steps in all, mean live rank or None) before the first step and
            after each one.
        on_measure: (batches measured, batches in all) after each batch of an evaluation set.
        on_log: (step, numbers) at each log and evaluation.
    """

    announce: Callable[[str], None] = lambda _line: None
    on_step: Callable[[int, int, float | None], None] = lambda _done, _total, _rank: None
    on_measure: Callable[[int, int], None] = lambda _done, _total: None
    on_log: Callable[[int, Mapping[str, Any]], None] = lambda _step, _numbers: None


class TellListener(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Passes steps and logs on to a Listener.

    Args:
        listener: who is told.
        ranks: live rank by module name, {} for a method without ranks.
    """

    def __init__(self, listener: Listener, ranks: Callable[[], Mapping[str, int]]) -> None:
        self.listener = listener
        self.ranks = ranks
        self._mean: float | None = None
        self._read_at = 0.0
        self._is_training = False
        self._measured = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Tell that the first step begins: it may take long."""
        if state.is_world_process_zero and not self._is_training:
            self.listener.on_step(state.global_step, state.max_steps, None)
        self._is_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Tell how far the run is; the ranks once a second at most."""
        if not state.is_world_process_zero:
            return
        if time.monotonic() - self._read_at >= RANKS_EVERY_S:
            ranks = self.ranks()
            self._mean = sum(ranks.values()) / len(ranks) if ranks else None
            self._read_at = time.monotonic()
        self.listener.on_step(state.global_step, state.max_steps, self._mean)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        eval_dataloader: Any,
        **_kwargs: Any,
    ) -> None:
        """Tell how far an evaluation is."""
        self._measured += 1
        if state.is_world_process_zero:
            self.listener.on_measure(self._measured, len(eval_dataloader))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Count the batches of the next set from 0."""
        self._measured = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Mapping[str, Any],
        **_kwargs: Any,
    ) -> None:
        """Pass on what Trainer logs."""
        if state.is_world_process_zero:
            self.listener.on_log(state.global_step, logs)
