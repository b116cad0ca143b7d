"""``dynlora``, its parametrisation with gates, and the controls that prune nothing or anything."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from dynlora import DynLoraCallback, DynLoraConfig, allocation
from dynlora.allocator.scores import Score
from dynlora.lora.components import LoraComponents
from dynlora.lora.follow import AdapterStart
from dynlora_lab.methods.adapted import Adapted, Target, trainable_beside
from dynlora_lab.methods.config_fields import shared_fields, whole_rank
from dynlora_lab.methods.options import AdapterOptions
from dynlora_lab.methods.rate_after import followed_by_rate


def dynlora(options: AdapterOptions, target: Target) -> Adapted:
    """The method on PEFT's LoRA: ranks start at ``init_r``, the least important components leave."""
    callback = DynLoraCallback(**options.settings())
    adapted = on_lora(options, target, callback)
    return replace(adapted, callbacks=followed_by_rate(callback, options.rate_after))


def dynlora_auto(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at ``init_r``, cut at ``prune_end`` to what the first evaluation set's loss allows."""
    rank = options.start_r
    settings = {**options.settings(), "target_r": "auto"}
    config = LoraConfig(r=rank, **shared_fields(options, target, rank=rank))
    callback = DynLoraCallback(**settings)
    model = get_peft_model(target.model, config)
    start = AdapterStart.of(model)
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        callbacks=followed_by_rate(callback, options.rate_after),
        ranks=lambda: callback.ranks or start.ranks,
        fits_from=lambda total_steps: int(settings["prune_end"] * total_steps) + 1,
    )


def random(options: AdapterOptions, target: Target) -> Adapted:
    """The same schedule and budget, but an order drawn once decides which components leave."""
    callback = DynLoraCallback(score=random_score(target.seed), **options.settings())
    return on_lora(options, target, callback)


def dynlora_gated(options: AdapterOptions, target: Target) -> Adapted:
    """The method in the paper's parametrisation: a gate in front of every component."""
    return _on_gates(options, target, rank=options.start_r)


def gated(options: AdapterOptions, target: Target) -> Adapted:
    """Gates and their init at the final rank; no pruning and no DEM, so that only these differ."""
    rank = whole_rank(options, "gated")
    return _on_gates(options, target, rank=rank, target_r=rank, dem_weight=0.0)


def random_score(seed: int) -> Score:
    """A score for RankAllocator: a number per component, drawn at the first step and kept."""

    @torch.no_grad()
    def score(modules: Sequence[LoraComponents], _step: int) -> None:
        if any(bool(module.ema.any()) for module in modules):
            return
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            drawn = torch.rand(len(module.ema), generator=generator, dtype=torch.float64)
            module.ema.copy_(drawn.clamp_min(1e-6))

    return score


def on_lora(options: AdapterOptions, target: Target, callback: DynLoraCallback) -> Adapted:
    """PEFT's LoRA of rank ``init_r`` with the callback of a method, whose settings are the budget's.

    Raises:
        ValueError: the recipe asks for a start of gates.
    """
    if options.init != "lora" or options.init_std is not None:
        raise ValueError(
            f"adapter.init={options.init!r}, adapter.init_std={options.init_std} are starts of gated "
            "components: choose method dynlora-gated, or leave them out."
        )
    config = LoraConfig(r=options.start_r, **shared_fields(options, target, rank=options.start_r))
    return _adapted(config, callback.settings, target, callback)


def _on_gates(options: AdapterOptions, target: Target, *, rank: int, **changed: float) -> Adapted:
    settings = {**options.settings(), **changed}
    config = DynLoraConfig(
        init_r=rank,
        init=options.init,
        init_std=options.init_std,
        **settings,
        **shared_fields(options, target, rank=rank),
    )
    return _adapted(config, settings, target, DynLoraCallback())


def _adapted(
    config: LoraConfig, settings: Mapping[str, Any], target: Target, callback: DynLoraCallback
) -> Adapted:
    model = get_peft_model(target.model, config)
    start = AdapterStart.of(model)
    in_components = settings["budget"] == "components"
    costs = [1 if in_components else size for size in start.sizes.values()]
    total = sum(cost * rank for cost, rank in zip(costs, start.ranks.values(), strict=True))
    final = allocation.target_cost(settings["target_r"], costs, in_components=in_components)

    def schedule(total_steps: int) -> list[tuple[int, int]]:
        first, last = allocation.pruning_window(
            total_steps, prune_start=settings["prune_start"], prune_end=settings["prune_end"]
        )
        plan = allocation.prune_plan(
            total=total,
            target=final,
            start=first,
            stop=last,
            interval=settings["prune_interval"],
        )
        return [(0, total), *plan]

    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        callbacks=[callback],
        ranks=lambda: (
            callback.ranks or (callback.allocator.ranks() if callback.allocator else start.ranks)
        ),
        schedule=schedule,
        fits_from=lambda total_steps: schedule(total_steps)[-1][0],
    )
