"""What must hold before and during a run, each with an error that says the way out.

NaN and infinity are reported where they arise, by module, and no rank is ever decided by them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dynlora.allocation import Settings
from dynlora.allocator.processes import world_size
from dynlora.errors import NotFiniteError
from dynlora.lora.components import LoraComponents
from dynlora.lora.sharding import gradient_of, local_part

_FIRST_STEPS = 2
"""LoRA starts at B = 0, so all sensitivities are 0 at the first step, and with warm-up at the second."""

_WAY_OUT = (
    "Lower the learning rate, clip gradients or look for a bad batch, and go on from the last "
    "checkpoint."
)


def check_total_steps(settings: Settings, total_steps: int | None) -> int:
    """Optimizer steps of the whole run, from the call or the settings; ValueError if they differ."""
    planned = settings.total_steps
    if total_steps is None and planned is None:
        raise ValueError(
            "total_steps is unknown: the schedule needs the number of optimizer steps of the whole "
            "run. Pass RankAllocator(..., total_steps=...)."
        )
    if total_steps is not None and planned not in {None, total_steps}:
        raise ValueError(
            f"total_steps={total_steps} differs from the total_steps={planned} in the adapter's config. "
            "Leave it out of the config: the Trainer or RankAllocator(..., total_steps=...) knows it."
        )
    return planned if total_steps is None else total_steps  # type: ignore[return-value]  # one is set


def check_evaluate(
    settings: Settings, evaluate: Callable[[], float] | None, modules: Sequence[LoraComponents]
) -> None:
    """Refuse ``target_r="auto"`` without a held-out loss, or on a sharded adapter."""
    if not settings.is_auto:
        return
    if any(m.is_sharded for m in modules):
        raise ValueError(
            "target_r='auto' tries smaller adapters in place, which one process cannot do to a model that "
            "FSDP or ZeRO shards. Set target_r to a number, or use DDP."
        )
    if evaluate is None:
        raise ValueError(
            "target_r='auto' needs a held-out loss. Give the Trainer an eval_dataset, or pass "
            "evaluate=..., a function that returns the held-out loss of the model."
        )


def check_target(
    settings: Settings,
    target: int,
    total: int,
    costs: Sequence[int],
    floors: Sequence[int],
    modules: Sequence[LoraComponents],
) -> None:
    """Refuse a target above what the adapter starts with, or below what its modules must keep.

    Args:
        settings: of the run.
        target: what ``target_r`` asks for.
        total: what all components cost at the start.
        costs: of one component of each module.
        floors: components that each module keeps.
        modules: the adapted modules.
    """
    asked = f"target_r={settings.target_r} asks for {target} {settings.budget}"
    needed = sum(f * c for f, c in zip(floors, costs, strict=True))
    if needed > target:
        fixed = [m.name for m in modules if not m.can_drop]
        why = f"every module keeps min_r={settings.min_r}"
        if not settings.min_r:
            why = (
                f"{len(fixed)} of {len(modules)} modules keep one component, because they hold fused "
                f"experts or their biases are trained, such as {fixed[0]!r}"
            )
        raise ValueError(f"{asked}, but {needed} must stay: {why}. Raise target_r.")
    # cuts are final: what is left at last could be too large for the target
    if target < max(costs):
        largest = modules[costs.index(max(costs))].name
        raise ValueError(
            f"{asked}, but one component of module {largest!r} has {max(costs)}, so perhaps no component "
            "could stay. Raise target_r, or count with budget='components'."
        )
    if target > total:
        ranks = sorted({m.rank for m in modules})
        raise ValueError(
            f"{asked}, but the {len(modules)} adapted modules start with {total}, at rank "
            f"{', '.join(map(str, ranks))}: pruning only removes components. Lower target_r, or raise r in "
            "the LoraConfig."
        )


def check_optimizer(optimizer: Any, modules: Sequence[LoraComponents]) -> None:
    """Refuse an optimizer that lacks a trained parameter of the modules, none of which is dropped."""
    if not isinstance(optimizer, Optimizer):
        return  # ZeRO's groups hold flat copies
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in modules:
        trained = {id(f.parameter) for f in module.factors if f.parameter.requires_grad}
        if not trained <= held:
            raise ValueError(
                f"optimizer={type(optimizer).__name__} does not hold the adapter parameters of "
                f"module {module.name!r}. Build it after get_peft_model, from [p for p in "
                "model.parameters() if p.requires_grad]. Where several optimizers share the adapter, as "
                "with Muon, pass one torch.optim.Optimizer that holds all parameters and whose step() "
                "calls theirs."
            )


def reading_is_free(modules: Sequence[LoraComponents]) -> bool:
    """Whether reading a number costs nothing; an accelerator would first finish all queued work."""
    return all(m.ema.device.type == "cpu" for m in modules)


class FiniteGuard:
    """Watches that the adapter's gradients are finite, without waiting for an accelerator.

    On a CPU a bad gradient is refused before the step is made. On an accelerator the finding stays on
    the device until ``read`` is called, where the run waits for the device anyway: at each log, pruning
    and checkpoint and at the end. Weights that a bad step has spoiled are never saved or finalized.
    """

    def __init__(self) -> None:
        self._bad: dict[
            torch.device, Tensor
        ] = {}  # 1 where a bad gradient was seen since the start

    @torch.no_grad()
    def look(self, modules: Sequence[LoraComponents], *, step: int, found_inf: Any = None) -> None:
        """Look at the gradients of the coming ``step``; on a CPU raise NotFiniteError at once.

        ``found_inf`` is that of a fused optimizer under a GradScaler, which skips such a step itself.
        """
        gradients = [g for m in modules for g in _gradients(m)]
        if reading_is_free(modules):
            self._refuse_now(modules, gradients, step)
            return
        for device in {g.device for g in gradients}:
            norms = torch._foreach_norm([g for g in gradients if g.device == device], float("inf"))
            largest = torch.stack(norms).amax()  # NaN if one is; no cast, a launch for each
            is_bad = ~(largest < math.inf)
            if found_inf is not None:
                is_bad &= found_inf.to(device) == 0
            held = self._bad.get(device)
            self._bad[device] = is_bad if held is None else held | is_bad

    def read(self, *, step: int) -> None:
        """Raise NotFiniteError if a bad gradient was seen since the run began; waits for the device."""
        if any(bool(flag) for flag in self._bad.values()):
            raise NotFiniteError(
                f"NaN or infinite gradient in the adapter at or before step {step}: its weights are "
                "spoiled, so nothing is pruned, saved or finalized. " + _WAY_OUT
            )

    def _refuse_now(
        self, modules: Sequence[LoraComponents], gradients: list[Tensor], step: int
    ) -> None:
        everywhere = torch.tensor(True)
        if gradients:
            sums = torch.stack([g.sum(dtype=torch.float32) for g in gradients])
            everywhere = torch.isfinite(sums).all()
        if world_size() > 1 and any(m.is_sharded for m in modules):  # others may hold the bad part
            flag = everywhere.to(torch.uint8)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            everywhere = flag.bool()
        if bool(everywhere):
            return
        names = [m.name for m in modules if not all(map(_is_finite, _gradients(m)))]
        where = f"module {names[0]!r}" if names else "a module held by another process"
        raise NotFiniteError(
            f"NaN or infinite gradient at step {step} in {where} (modules with such "
            f"gradients: {len(names)}): the step is not made, and nothing is pruned. " + _WAY_OUT
        )


def _gradients(module: LoraComponents) -> list[Tensor]:
    found = [gradient_of(factor.parameter) for factor in module.factors]
    return [gradient for gradient in found if gradient is not None and gradient.numel()]


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def check_weights(modules: Sequence[LoraComponents]) -> None:
    """Raise NotFiniteError, naming the first module, if weights of the adapter are not finite."""
    held = {
        m.name: [w for f in m.factors if (w := local_part(f.parameter.detach())).numel()]
        for m in modules
        if not m.is_dropped
    }
    weights = [weight for of_module in held.values() for weight in of_module]
    if _is_finite(get_total_norm(weights, math.inf)):
        return
    bad = [name for name, of_module in held.items() if not all(map(_is_finite, of_module))]
    raise NotFiniteError(
        f"adapter weights of module {bad[0]!r} (modules with such weights: {len(bad)}) are NaN or "
        "infinite. Go on from a checkpoint before the loss became NaN, with a lower learning rate or "
        "clipped gradients."
    )


def check_scores(
    modules: Sequence[LoraComponents], *, step: int, if_zero: str, if_not_finite: str
) -> None:
    """Refuse scores that nothing can be decided by: not finite, or all 0, which keeps the first modules.

    In the first two steps of a run they are 0 by nature; then a warning says what was decided how.
    ``if_zero`` and ``if_not_finite`` say in the messages what such scores come from.
    """
    if not any(bool(m.ema.any()) for m in modules):
        if step > _FIRST_STEPS:
            raise ValueError(
                f"all scores are 0 after {step} steps, so they do not say which components to keep: "
                f"{if_zero}."
            )
        warnings.warn(
            f"Components are pruned at step {step}, before any has learned anything: those of the first "
            "modules are kept. Train for more steps, or set a later prune_end.",
            stacklevel=2,
        )
    bad = [m.name for m in modules if not _is_finite(m.ema)]
    if bad:
        raise NotFiniteError(
            f"NaN or infinite importance at step {step} in module {bad[0]!r} (modules with such "
            f"scores: {len(bad)}), from {if_not_finite}: nothing is pruned by such scores. "
            + _WAY_OUT
        )
