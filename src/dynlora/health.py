"""NaN and infinity are reported where they arise, by module; no rank is ever decided by them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynlora.adapter.components import GatedLayer
from dynlora.adapter.sharding import gradient_of
from dynlora.distributed import world_size

_FACTORS = ("A", "B", "the gate c")


def can_look(layers: Sequence[GatedLayer]) -> bool:
    """Whether reading a number costs nothing; on an accelerator it would wait for all queued work."""
    return layers[0].ema.device.type == "cpu"


@torch.no_grad()
def check_gradients(layers: Sequence[GatedLayer], *, step: int) -> None:
    """Refuse a step whose adapter gradients are not finite, before it spoils weights and moments.

    Args:
        layers: the adapter's layers.
        step: number of the step about to be made, for the message.

    Raises:
        FloatingPointError: a gradient holds NaN or infinity; it names the first module.
    """
    found = [
        (gated.name, kind, gradient)
        for gated in layers
        if not gated.is_dropped
        for kind, parameter in zip(_FACTORS, gated.parameters, strict=True)
        if (gradient := gradient_of(parameter)) is not None and gradient.numel()
    ]
    if not found:
        return
    is_finite = torch.isfinite(torch.stack(_finite_if_all_are([g for _, _, g in found])))
    everywhere = is_finite.all()
    if world_size() > 1 and any(m.is_sharded for m in layers):  # others may hold the bad part
        flag = everywhere.to(torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        everywhere = flag.bool()
    if bool(everywhere):
        return
    bad = [
        (name, kind)
        for (name, kind, _), ok in zip(found, is_finite.tolist(), strict=True)
        if not ok
    ]
    where = f"{bad[0][1]} of module {bad[0][0]!r}" if bad else "a module held by another process"
    modules = len({name for name, _ in bad})
    raise FloatingPointError(
        f"NaN or infinite gradient at step {step} in {where} ({modules} modules in all): the step is not "
        "made, and nothing is pruned. Lower the learning rate, clip gradients, look for a bad batch, and "
        "go on from the last checkpoint."
    )


def _finite_if_all_are(tensors: list[Tensor]) -> list[Tensor]:
    """One fp32 scalar a tensor: NaN or infinite if any element is, in the fastest way of the device."""
    if tensors[0].device.type == "cpu":
        return [t.sum(dtype=torch.float32) for t in tensors]
    return [norm.float() for norm in torch._foreach_norm(tensors, float("inf"))]


def check_importance(
    names: Sequence[str], importance: Sequence[Tensor], *, step: int, cause: str
) -> None:
    """Refuse scores that are not finite, before they reach the smoothed ones.

    Args:
        names: module names.
        importance: scores of each module, (rank,).
        step: the step just made, for the message.
        cause: where such scores come from, for the message.

    Raises:
        FloatingPointError: a score is NaN or infinite.
    """
    if not importance or bool(torch.isfinite(torch.cat([s.flatten() for s in importance])).all()):
        return
    bad = [n for n, s in zip(names, importance, strict=True) if not bool(torch.isfinite(s).all())]
    raise FloatingPointError(
        f"NaN or infinite importance at step {step} in module {bad[0]!r} ({len(bad)} modules "
        f"in all), from {cause}: nothing is pruned by such scores. Mend it, or lower the learning rate and "
        "clip gradients, and resume from the last checkpoint."
    )
