"""Models that moved after their scores were made."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora import RankAllocator
from dynlora.lora.follow import AdapterStart


def adapted():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_scores_follow_a_model_that_moves_between_its_loading_and_its_run():
    model = adapted()
    start = AdapterStart.of(model)
    model.to("meta")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    allocator = RankAllocator(model, optimizer, total_steps=10, target_r=2, start=start)
    assert all(m.ema.device.type == m.live.device.type == "meta" for m in allocator.modules)
