"""One trained LoRA at many smaller sizes: the curve of score against size, for the price of one run."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora.lora.curvature import Curvature
from dynlora.lora.follow import AdapterStart
from dynlora.lora.triplets import to_singular_
from dynlora_lab.methods.adapted import Adapted, Target
from dynlora_lab.methods.before_training import first_batches
from dynlora_lab.methods.lora import lora_initial, mask_within_
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
    curvature = _measured(made, target, Curvature(start.modules))
    turns: dict[str, Callable[[], Tensor]] = {
        "singular values": lambda: torch.cat([to_singular_(m).cpu() for m in start.modules]),
        "curvature": curvature.turn_,
    }
    factors = [f.parameter.data for m in start.modules for f in m.factors]
    trained = [f.clone() for f in factors]
    for order, turn_ in turns.items():
        scores = turn_()
        turned = [f.clone() for f in factors]
        for rank in RANKS:
            if rank < options.start_r:
                kept = mask_within_(start, scores, target_r=rank, budget=options.budget)
                yield {"order": order, "rank": rank, "parameters": kept}
                _put_back_(factors, turned)
        _put_back_(factors, trained)


@torch.no_grad()
def _put_back_(factors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.copy_(value)


def _measured(made: Adapted, target: Target, curvature: Curvature) -> Curvature:
    was_training = made.model.training
    made.model.eval()
    for batch in first_batches(target, BATCHES):
        made.model.zero_grad()
        made.model(**batch).loss.backward()
        curvature.add()
    made.model.zero_grad()
    made.model.train(was_training)
    return curvature
