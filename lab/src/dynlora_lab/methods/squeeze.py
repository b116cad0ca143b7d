"""``cont-squeeze``, ``in-squeeze`` and ``dynlora-rotated``: cuts by singular values while training runs.

All three are DynLoraCallback with a ``score`` of their own and its schedule; the allocator cuts, holds
at 0, and removes for real. The first two are LoRA-Squeeze's (arXiv 2602.10993): every module has the same
rank.
"""

from collections.abc import Sequence

import torch

from dynlora import DynLoraCallback, allocation
from dynlora.lora.components import LoraComponents
from dynlora_lab.methods.adapted import Adapted, Target
from dynlora_lab.methods.dynamic import on_lora
from dynlora_lab.methods.options import AdapterOptions
from dynlora_lab.methods.singular import squared_norms, to_singular_triplets_

_NEVER = 10**9  # steps between two prunings: the only one is at the end of the window


def cont_squeeze(options: AdapterOptions, target: Target) -> Adapted:
    """A LoRA of rank ``init_r``, cut once to ``target_r`` by SVD at ``prune_end``, and trained on."""
    once = {**options.settings(), "prune_interval": _NEVER}
    return on_lora(options, target, squeezed(DynLoraCallback(**once), is_uniform=True))


def in_squeeze(options: AdapterOptions, target: Target) -> Adapted:
    """The same in steps: an SVD and a cut every ``prune_interval`` steps of the pruning window."""
    callback = DynLoraCallback(**options.settings())
    return on_lora(options, target, squeezed(callback, is_uniform=True))


def dynlora_rotated(options: AdapterOptions, target: Target) -> Adapted:
    """As ``in-squeeze``, but singular values of the whole model decide, so that ranks differ."""
    callback = DynLoraCallback(**options.settings())
    return on_lora(options, target, squeezed(callback, is_uniform=False))


def squeezed(callback: DynLoraCallback, *, is_uniform: bool) -> DynLoraCallback:
    """Give a callback a score: components become singular triplets at each pruning, and the last ones go.

    Args:
        callback: whose schedule says when.
        is_uniform: whether each module loses as many, as far as the budget allows; otherwise those with
            the least energy per parameter in the whole model go.
    """

    @torch.no_grad()
    def score(modules: Sequence[LoraComponents], step: int) -> None:
        allocator = callback.allocator
        assert allocator is not None  # noqa: S101  # it is the one that calls
        interval = allocator.settings.prune_interval
        window = {"start": allocator.start, "stop": allocator.stop}
        if not allocation.is_prune_step(step, interval=interval, **window):
            return
        for module in modules:
            to_singular_triplets_(module, allocator.optimizer)
            if is_uniform:
                places = torch.arange(module.rank, 0, -1, device=module.ema.device)
                # per parameter it is the place alone
                module.ema.copy_(places * module.component_size)
            else:
                module.ema.copy_(squared_norms(module))

    callback.score = score
    return callback
