"""A score of one's own below 0 would cut everything at the first prune event."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynlora import RankAllocator
from small_net import adamw, small_net, train


def test_negative_scores_are_refused_before_anything_is_cut():
    def negative(modules, _step):
        for module in modules:
            module.ema.copy_(-1.0 - torch.arange(len(module.ema)))

    model = get_peft_model(small_net(), LoraConfig(r=4, target_modules=["0", "1", "2"]))
    optimizer = adamw(model)
    allocator = RankAllocator(
        model, optimizer, total_steps=40, target_r=2, prune_interval=1, score=negative
    )
    with pytest.raises(
        ValueError, match=r"score wrote -4 into module.ema of 'layers.0' at step \d+"
    ):
        train(model, optimizer, 40)
    assert set(allocator.ranks().values()) == {4}
