"""One trained LoRA at many smaller sizes: the curve of score against size, for the price of one run."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from dynlora import allocation
from dynlora.allocator.masks import Masks
from dynlora.lora.curvature import Curvature
from dynlora.lora.follow import AdapterStart
from dynlora.lora.triplets import to_singular_
from dynlora_lab.methods.adapted import Adapted, Target
from dynlora_lab.methods.lora import lora_initial
from dynlora_lab.methods.options import AdapterOptions

RANKS = (12, 8, 6, 5, 4, 3, 2, 1, 0)
"""Mean ranks of the cuts, those below ``init_r``; at 0 the model is its base, with the trained head."""

BATCHES = 24
"""Of the training rows, whose gradients the curvature is from."""


def lora_cuts(options: AdapterOptions, target: Target) -> Adapted:
    """PEFT's LoRA at the initial rank, which stays whole; ``cuts``: by singular values and by curvature."""
    made = lora_initial(options, target)
    return dataclasses.replace(made, cuts=lambda: _cuts(made, options, target))


def _cuts(made: Adapted, options: AdapterOptions, target: Target) -> Iterator[dict[str, Any]]:
    """Put one cut after the other into the model, and say which; at the end the whole is there again."""
    start = AdapterStart.of(made.model)
    modules = start.modules
    in_components = options.budget == "components"
    sizes = [1 if in_components else size for size in start.sizes.values()]
    costs = torch.tensor(sizes).repeat_interleave(torch.tensor([m.rank for m in modules]))
    curvature = _measured(made, target, Curvature(modules))
    factors = [f.parameter.data for m in modules for f in m.factors]
    trained = [f.clone() for f in factors]
    for order in ("singular values", "curvature"):
        for rank in RANKS:
            if rank >= options.start_r:
                continue
            if order == "curvature":
                scores = curvature.turn_()
            else:
                scores = torch.cat([to_singular_(module).cpu() for module in modules])
            budget = allocation.target_cost(rank, sizes, in_components=in_components) if rank else 0
            keep = allocation.select_components(scores, costs, budget)
            for module, live in zip(modules, keep.split([m.rank for m in modules]), strict=True):
                module.live.copy_(live)
            Masks(modules).apply_()
            yield {"order": order, "rank": rank, "parameters": int(costs[keep].sum())}
            with torch.no_grad():
                for factor, value in zip(factors, trained, strict=True):
                    factor.copy_(value)


def _measured(made: Adapted, target: Target, curvature: Curvature) -> Curvature:
    was_training = made.model.training
    made.model.eval()
    device = next(made.model.parameters()).device
    for batch in islice(target.batches(), BATCHES):
        made.model.zero_grad()
        made.model(**{k: v.to(device) for k, v in batch.items()}).loss.backward()
        curvature.add()
    made.model.zero_grad()
    made.model.train(was_training)
    return curvature
