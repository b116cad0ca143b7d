"""``fim``: ranks from the empirical Fisher information of a few batches, before training begins."""

import dataclasses
from collections.abc import Mapping

import torch

from dynlora.allocation import Budget, select_components, target_cost
from dynlora.allocator.processes import mean_over_processes
from dynlora_lab.methods.adapted import Adapted, Target
from dynlora_lab.methods.before_training import first_batches, gradient_of, temporary_lora
from dynlora_lab.methods.config_fields import component_sizes, shared_fields, whole_rank
from dynlora_lab.methods.lora import lora
from dynlora_lab.methods.options import AdapterOptions

LARGEST = 2
"""A module gets at most so many times ``target_r``, by FIM-LoRA's default; and at least rank 1."""


def fim(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at ranks in proportion to the Fisher information of each module's B (FIM-LoRA).

    Scores and bounds are those of Sathyavageeswaran, arXiv 2605.16800, and of the same author's
    huggingface/peft#3204, which reads A instead, whose gradient is 0 at the start. There the ranks add up
    to those of a LoRA of rank ``target_r``; here that is so with ``budget: components``, and by default
    the parameters do. A model without weights gets rank ``target_r`` everywhere, which costs the same.

    Raises:
        ValueError: ``target_r`` is not a whole number, or a gradient is not finite.
    """
    rank = whole_rank(options, "fim")
    if next(target.model.parameters()).is_meta:
        return lora(options, target)
    sizes = component_sizes(options, target)
    scores = fisher_scores(options, target, rank=rank)
    ranks = proportional_ranks(scores, sizes, rank=rank, budget=options.budget)
    return lora(dataclasses.replace(options, ranks=ranks), target)


def fisher_scores(options: AdapterOptions, target: Target, *, rank: int) -> dict[str, float]:
    """Mean of the Fisher information's diagonal over the entries of B, by module name.

    The empirical one: the mean over the first batches of (∂L/∂B)², at a LoRA of that rank as PEFT starts
    it, B = 0, whose gradient is that of the adapted weight times Aᵀ.
    """
    fields = shared_fields(options, target, rank=rank)
    batches = list(first_batches(target))
    with temporary_lora(target.model, fields, rank=rank) as modules:
        scores = dict.fromkeys((module.name for module in modules), 0.0)
        for batch in batches:
            target.model(**batch).loss.backward()
            for module in modules:
                squares = [gradient_of(b).square() for _, b in module.pairs]
                mean = float(torch.cat([s.flatten() for s in squares]).mean())
                scores[module.name] += mean / len(batches)
            target.model.zero_grad()
        device = modules[0].probes[0].parameter.device
    return {name: mean_over_processes(score, device) for name, score in scores.items()}


def proportional_ranks(
    scores: Mapping[str, float], sizes: Mapping[str, int], *, rank: int, budget: Budget
) -> dict[str, int]:
    """Whole ranks in proportion to ``scores``, from 1 to ``LARGEST`` · rank, that use up the budget.

    The component numbered k of a module is worth score / (k - ½), and the most valuable ones are bought
    (Sainte-Laguë's rule): each rank is score / t, rounded, with one t for all. What a module cannot take,
    the others get.

    Args:
        scores: by module name.
        sizes: parameters of one component, by module name.
        rank: of the LoRA that costs as much.
        budget: what it counts; see ``dynlora.allocation.Settings``.

    >>> proportional_ranks({"a": 3.0, "b": 1.0, "c": 0.0}, {"a": 8, "b": 8, "c": 8}, rank=2,
    ...                    budget="parameters")
    {'a': 4, 'b': 1, 'c': 1}
    """
    most = LARGEST * rank
    in_components = budget == "components"
    costs = [1 if in_components else size for size in sizes.values()]
    value = torch.tensor([scores[name] for name in sizes], dtype=torch.float64)
    cost = torch.tensor(costs)
    worth = (value * cost)[:, None] / (
        torch.arange(most) + 0.5
    )  # of a component, by parameter: / cost
    keep = select_components(
        worth.flatten(),
        cost.repeat_interleave(most),
        target_cost(rank, costs, in_components=in_components),
        floors=[1] * len(costs),
        sizes=[most] * len(costs),
    )
    return dict(zip(sizes, keep.view(-1, most).sum(1).tolist(), strict=True))
