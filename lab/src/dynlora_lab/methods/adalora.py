"""``adalora``: PEFT's AdaLoRA, told about every step, with the same budget and window."""

from typing import Any

from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import SVDLinear
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora_lab.methods.adapted import Adapted, Target
from dynlora_lab.methods.config_fields import shared_fields, whole_rank
from dynlora_lab.methods.options import AdapterOptions

_ANY_LENGTH = 10**9  # until training begins and its real length is known


def adalora(options: AdapterOptions, target: Target) -> Adapted:
    """AdaLoRA from ``init_r`` to ``target_r``, its own cubic inside our pruning window.

    PEFT leaves calling ``update_and_allocate`` to the training loop, and Trainer does not; the
    callback does, after the backward pass of every optimizer step and before gradients are cleared.

    Raises:
        ValueError: ``target_r`` is not a whole number below ``init_r``.
    """
    rank = whole_rank(options, "adalora")
    if rank >= options.start_r:
        raise ValueError(
            f"adapter.init_r={options.start_r} must be above adapter.target_r={rank} for adalora: PEFT's "
            "AdaLoRA fails where there is nothing to prune."
        )
    config = AdaLoraConfig(
        init_r=options.start_r,
        target_r=rank,
        deltaT=options.prune_interval,
        total_step=_ANY_LENGTH,
        **shared_fields(options, target, rank=options.start_r),
    )
    model = get_peft_model(target.model, config)
    callback = AdaLoraCallback(options)

    def ranks() -> dict[str, int]:
        """PEFT draws singular values at 0, so that zeros mean something only after a step."""
        return {
            name: int((e != 0).sum()) if callback.has_stepped else e.numel()
            for name, e in singular_values(model).items()
        }

    def parameters() -> int:
        """In + out + 1 numbers for each triplet that is not pruned."""
        sizes = {
            name: module.lora_A["default"].shape[1] + module.lora_B["default"].shape[0] + 1
            for name, module in _svd_layers(model).items()
        }
        return sum(rank * sizes[name] for name, rank in ranks().items())

    return Adapted(
        model=model,
        parameters=parameters,
        callbacks=[callback],
        ranks=ranks,
        fits_from=lambda total_steps: int(options.prune_end * total_steps),
        can_resume=False,  # PEFT saves fewer rows than the model that would load them has
    )


class AdaLoraCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Sets AdaLoRA's schedule when the length of the run is known, and drives it."""

    def __init__(self, options: AdapterOptions) -> None:
        self.options = options
        self.has_stepped = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        **_kwargs: Any,
    ) -> None:
        """The pruning window in steps."""
        config = model.peft_config["default"]
        total = state.max_steps
        config.total_step = total
        config.tinit = min(int(self.options.prune_start * total), total - 2)
        config.tfinal = min(total - int(self.options.prune_end * total), total - config.tinit - 1)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        **_kwargs: Any,
    ) -> None:
        """Between the step and zero_grad; ``global_step`` is still that of the step before."""
        self.has_stepped = True
        model.base_model.update_and_allocate(state.global_step + 1)


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Λ of each adapted module, (init_r, 1), by module name."""
    return {name: module.lora_E["default"].detach() for name, module in _svd_layers(model).items()}


def _svd_layers(model: nn.Module) -> dict[str, SVDLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SVDLinear)
    }
