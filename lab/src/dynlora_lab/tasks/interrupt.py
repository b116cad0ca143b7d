"""Ctrl-C during training: finish the step, write a checkpoint, stop."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from dynlora.distributed import any_process, world_size
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SAME_PRESS_S = 1.0  # launchers pass on a Ctrl-C that the terminal has sent to all processes already
AGREE_EVERY = 10  # optimizer steps; agreeing waits for all processes


class Interrupted(Exception):  # noqa: N818 (not a failure)
    """Training was stopped by Ctrl-C and can go on.

    Attributes:
        step: optimizer steps done.
        has_checkpoint: whether they are saved.
    """

    def __init__(self, step: int, *, has_checkpoint: bool) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step
        self.has_checkpoint = has_checkpoint


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Turns the first Ctrl-C into a checkpoint and Interrupted; the second one stops at once.

    Used as a context manager around ``trainer.train``. It must be the last of the callbacks, so that
    the others have done their part of the step.

    Args:
        can_resume: False stops without a checkpoint.
    """

    def __init__(self, *, can_resume: bool = True) -> None:
        self.can_resume = can_resume
        self._asked_at: float | None = None
        self._stops = False  # agreed by all processes
        self._before: Any = None

    def __enter__(self) -> "StopOnInterrupt":
        """Listen for Ctrl-C."""
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > SAME_PRESS_S:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Ask for a checkpoint of the step that has just ended; several processes agree on the step."""
        asked = self._asked_at is not None
        if world_size() > 1:
            asked = state.global_step % AGREE_EVERY == 0 and any_process(asked, args.device)
        self._stops = asked
        if asked and not self.can_resume:
            raise Interrupted(state.global_step, has_checkpoint=False)
        if asked:
            control.should_save = True
            control.should_evaluate = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """The checkpoint is whole now."""
        if self._stops:
            raise Interrupted(state.global_step, has_checkpoint=True)
