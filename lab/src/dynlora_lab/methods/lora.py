"""PEFT's LoRA: at the final rank, at the initial one, and cut from the one to the other by SVD."""

import dataclasses
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from dynlora.allocation import Budget, select_components, target_cost
from dynlora.allocator.masks import Masks
from dynlora.lora.adapter import LoraAdapter
from dynlora.lora.configs import rewrites_base
from dynlora.lora.follow import AdapterStart
from dynlora_lab.methods.adapted import Adapted, Target, trainable_beside
from dynlora_lab.methods.config_fields import (
    placed_ranks,
    ranked_fields,
    shared_fields,
    whole_rank,
)
from dynlora_lab.methods.options import AdapterOptions
from dynlora_lab.methods.singular import squared_norms, to_singular_triplets_
from dynlora_lab.methods.starts import plain_saver, with_start


def lora(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA with every rank at the final budget, or with ``ranks``; scaling lora_alpha / target_r.

    With ``placement`` on a part of the modules, with ``init_lora_weights`` from another start, and with
    ``loraplus_lr_ratio`` by PEFT's LoRA+ optimizer.

    Raises:
        ValueError: ``target_r`` is not a whole number, ``ranks`` names what the model does not have, or
            ``placement`` leaves no module.
    """
    ranks = options.ranks if options.placement == "all" else placed_ranks(options, target)
    if ranks is None:
        rank = whole_rank(options, "lora")
        fields = {"r": rank, **shared_fields(options, target, rank=rank)}
    else:
        fields = shared_fields(options, target, rank=options.target_r)
        fields |= ranked_fields(options, ranks, target.model)
    model = with_start(options, target, fields)
    ratio = options.loraplus_lr_ratio
    return dataclasses.replace(
        _trained(model, target),
        save=plain_saver(model) if rewrites_base(model.peft_config["default"]) else None,
        optimizer=None if ratio is None else _loraplus(model, ratio),
    )


def lora_initial(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at the rank that the pruning methods start with, so larger than theirs at the end."""
    return _plain(options, target, options.start_r)


def lora_svd(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at the initial rank; after training the model's largest singular values stay.

    The control for "train big, truncate once": see ``truncate_``.
    """
    made = _plain(options, target, options.start_r)
    final: dict[str, int] = {}

    def cut() -> None:
        final.update(truncate_(made.model, target_r=options.target_r, budget=options.budget))

    return dataclasses.replace(
        made,
        finish=cut,
        ranks=lambda: final or made.ranks(),
        fits_from=lambda total_steps: total_steps + 1,  # cut after the last of them
    )


@torch.no_grad()
def truncate_(
    model: nn.Module, *, target_r: float, budget: Budget = "components"
) -> dict[str, int]:
    """Cut a plain LoRA to its largest singular values, in place.

    All modules' updates are compared together: what stays is, in components, the best approximation in
    the Frobenius norm, and in parameters the greedy one, by square of the singular value per parameter.

    Args:
        model: with one trainable plain LoRA.
        target_r: mean rank per module to keep.
        budget: what it counts; see ``dynlora.allocation.Settings``.

    Returns:
        Rank by module name, zeros included.
    """
    start = AdapterStart.of(model)
    for module in start.modules:
        to_singular_triplets_(module)
    scores = torch.cat([squared_norms(module) for module in start.modules])
    mask_within_(start, scores, target_r=target_r, budget=budget)
    return LoraAdapter(model, start).finish_()


@torch.no_grad()
def mask_within_(start: AdapterStart, scores: Tensor, *, target_r: float, budget: Budget) -> int:
    """Set all components of a LoRA to 0 but those with the most score per cost that a budget holds.

    Args:
        start: the LoRA; ``live`` of its modules says what stays.
        scores: of all components, in module order.
        target_r: mean rank per module to keep; 0 keeps nothing.
        budget: what it counts.

    Returns:
        What is kept, in the unit of the budget.
    """
    in_components = budget == "components"
    sizes = [1 if in_components else size for size in start.sizes.values()]
    ranks = [module.rank for module in start.modules]
    costs = torch.tensor(sizes).repeat_interleave(torch.tensor(ranks))
    limit = target_cost(target_r, sizes, in_components=in_components) if target_r else 0
    keep = select_components(scores, costs, limit)
    for module, live in zip(start.modules, keep.split(ranks), strict=True):
        module.live.copy_(live)
    # a module that cannot lose its adapter keeps a component, which must be 0
    Masks(start.modules).apply_()
    return int(costs[keep].sum())


def _plain(options: AdapterOptions, target: Target, rank: int) -> Adapted:
    config = LoraConfig(r=rank, **shared_fields(options, target, rank=rank))
    return _trained(get_peft_model(target.model, config), target)


def _loraplus(model: nn.Module, ratio: float) -> Any:
    """PEFT's LoRA+ over the optimizer that the Trainer's arguments name, built once they are known."""

    def build(arguments: TrainingArguments) -> Optimizer:
        kind, fields = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return create_loraplus_optimizer(
            model,
            kind,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=arguments.weight_decay,
            **fields,
        )

    return build


def _trained(model: nn.Module, target: Target) -> Adapted:
    return Adapted(
        model=model,
        parameters=lambda: trainable_beside(model, target.head),
        ranks=lambda: lora_ranks(model),
    )


def lora_ranks(model: nn.Module) -> dict[str, int]:
    """Rank of the adapter ``default`` by module name, of a plain LoRA."""
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in getattr(module, "r", {})
    }
