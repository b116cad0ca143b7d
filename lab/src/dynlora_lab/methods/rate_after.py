"""Another learning rate after the freeze: does what is left bear more, as small LoRAs do?"""

from typing import Any

from transformers import TrainerCallback

from dynlora import DynLoraCallback


def followed_by_rate(callback: DynLoraCallback, factor: float) -> list[TrainerCallback]:
    """The callback, and behind it one that multiplies every learning rate once, at its freeze."""
    return [callback] if factor == 1 else [callback, _RateAfter(callback, factor)]


class _RateAfter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """The scheduler keeps its base rates in its state, so a run that is resumed has what it had."""

    def __init__(self, allocating: DynLoraCallback, factor: float) -> None:
        self.allocating, self.factor = allocating, factor
        self.was_frozen = False

    @property
    def _is_frozen(self) -> bool:
        allocator = self.allocating.allocator
        return allocator is not None and allocator.is_frozen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how the step finds it."""
        self.was_frozen = self._is_frozen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change the rates of the optimizer and of its schedule after the step that froze."""
        if self.was_frozen or not self._is_frozen:
            return
        scheduler = kwargs["lr_scheduler"]
        scheduler.base_lrs = [rate * self.factor for rate in scheduler.base_lrs]
        for group in kwargs["optimizer"].param_groups:
            group["lr"] *= self.factor
