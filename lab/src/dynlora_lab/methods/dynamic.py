"""``dynlora`` and its controls ``gated`` (nothing is pruned) and ``random`` (anything is)."""

from collections.abc import Sequence
from typing import Any

import torch
from dynlora.adapter.components import GatedLayer, find_gated_layers
from dynlora.adapter.config import DynLoraConfig
from dynlora.scoring import Score
from dynlora.trainer import DynLoraCallback
from peft import get_peft_model

from dynlora import allocation
from dynlora_lab.methods.adapted import Adapted, Target, trainable_beside
from dynlora_lab.methods.lora import shared_fields, whole_rank
from dynlora_lab.methods.options import AdapterOptions


def dynlora(options: AdapterOptions, target: Target) -> Adapted:
    """The method: ranks start at ``init_r``, the least important components leave."""
    return _adapted(_config(options, target), target, DynLoraCallback())


def random(options: AdapterOptions, target: Target) -> Adapted:
    """The same schedule and budget, but an order drawn once decides which components leave."""
    return _adapted(
        _config(options, target), target, DynLoraCallback(score=random_score(target.seed))
    )


def gated(options: AdapterOptions, target: Target) -> Adapted:
    """Gates and their init at the final rank; no pruning and no DEM, so that only these differ."""
    rank = whole_rank(options, "gated")
    config = _config(options, target, init_r=rank, target_r=rank, dem_weight=0.0)
    return _adapted(config, target, DynLoraCallback())


def random_score(seed: int) -> Score:
    """A score for RankAllocator: a number per component, drawn at the first step and kept."""

    @torch.no_grad()
    def score(layers: Sequence[GatedLayer], _step: int) -> None:
        if any(bool(gated.ema.any()) for gated in layers):
            return
        generator = torch.Generator().manual_seed(seed)
        for gated in layers:
            drawn = torch.rand(gated.num_components, generator=generator, dtype=torch.float64)
            gated.ema.copy_(drawn.clamp_min(1e-6))

    return score


def _config(options: AdapterOptions, target: Target, **changed: float) -> DynLoraConfig:
    fields: dict[str, Any] = {
        "init_r": options.start_r,
        "target_r": options.target_r,
        "prune_start": options.prune_start,
        "prune_end": options.prune_end,
        "prune_interval": options.prune_interval,
        "ema_beta": options.ema_beta,
        "dem_weight": options.dem_weight,
        "revival": options.revival,
        "compact": options.compact,
        "init_std": options.init_std,
        "init": options.init,
        "importance": options.importance,
        "schedule": options.schedule,
        "budget": options.budget,
        "forget_pruned": options.forget_pruned,
    }
    return DynLoraConfig(**{**fields, **changed}, **shared_fields(options, target))


def _adapted(config: DynLoraConfig, target: Target, callback: DynLoraCallback) -> Adapted:
    model = get_peft_model(target.model, config)
    start = {m.name: m.num_components for m in find_gated_layers(model, "default")}

    def schedule(total_steps: int) -> list[tuple[int, int]]:
        first, last = allocation.pruning_window(
            total_steps, prune_start=config.prune_start, prune_end=config.prune_end
        )
        return allocation.prune_plan(
            total=sum(start.values()),
            target=allocation.target_components(config.target_r, len(start)),
            start=first,
            stop=last,
            interval=config.prune_interval,
            schedule=config.schedule,
        )

    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        callbacks=[callback],
        ranks=lambda: (
            callback.ranks or (callback.allocator.ranks() if callback.allocator else start)
        ),
        schedule=schedule,
        fits_from=lambda total_steps: schedule(total_steps)[-1][0],
    )
