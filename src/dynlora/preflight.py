"""What must be true before a run begins, each with an error that says the way out."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from dynlora import allocation
from dynlora.adapter.components import GatedLayer
from dynlora.adapter.config import DynLoraConfig
from dynlora.adapter.sharding import needs_full_gradient


def known_total_steps(config: DynLoraConfig, total_steps: int | None) -> int:
    """Optimizer steps of the whole run, from the call or the config.

    Raises:
        ValueError: neither says it, or they differ.
    """
    planned = config.total_steps
    if total_steps is None and planned is None:
        raise ValueError(
            "total_steps is unknown: the schedule needs the number of optimizer steps of the whole "
            "run. Pass RankAllocator(..., total_steps=...) or DynLoraConfig(total_steps=...)."
        )
    if total_steps is not None and planned is not None and total_steps != planned:
        raise ValueError(
            f"total_steps={total_steps} differs from DynLoraConfig(total_steps={planned}). Leave it "
            "out of the config to follow the trainer."
        )
    return planned if total_steps is None else total_steps  # type: ignore[return-value]  # one is set


def known_target(config: DynLoraConfig, layers: Sequence[GatedLayer]) -> int:
    """N_T, the components that ``target_r`` asks for.

    Raises:
        ValueError: the modules start with fewer.
    """
    target = allocation.target_components(config.target_r, len(layers))
    present = sum(m.num_components for m in layers)
    if target > present:
        raise ValueError(
            f"target_r={config.target_r} asks for {target} components, but "
            f"the {len(layers)} adapted modules start with {present}. Lower "
            "target_r, or raise init_r or rank_pattern."
        )
    return target


def check_optimizer(optimizer: Any, layers: Sequence[GatedLayer]) -> None:
    """Refuse an optimizer that trains other parameters than the adapter's present ones.

    Raises:
        ValueError: a parameter of the adapter is missing in it.
    """
    if not isinstance(optimizer, Optimizer):
        return  # ZeRO's groups hold flat copies
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for gated in layers:
        if not gated.is_dropped and not {id(p) for p in gated.parameters} <= held:
            raise ValueError(
                f"optimizer={type(optimizer).__name__} does not hold the adapter parameters of "
                f"module {gated.name!r}. Build it after get_peft_model and after loading adapter "
                "weights, from [p for p in model.parameters() if p.requires_grad]."
            )


def check_shards(config: DynLoraConfig, layers: Sequence[GatedLayer]) -> None:
    """Refuse options that FSDP1 and DeepSpeed cannot serve.

    Raises:
        ValueError: optimizer state would be changed that is not kept whole there.
    """
    present = [m for m in layers if not m.is_dropped]
    if not present or not needs_full_gradient(present[0].gate):
        return
    if config.forget_pruned:
        raise ValueError(
            "forget_pruned=True changes optimizer state that FSDP1 and DeepSpeed do not keep whole. Use "
            "FSDP2 or DDP, or leave the field out."
        )
