"""Stock LoRA adapters in the middle or at the end of a run that empties some modules."""

import torch
from peft import LoraConfig, get_peft_model

from dynlora import RankAllocator
from tiny_models import batch, tiny_llama


def stock(build=tiny_llama, **fields):
    """A model with a stock LoRA of rank 4, scaling 2, on every linear layer."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields}
    return get_peft_model(build(), LoraConfig(**fields))


def first_die(modules, _step):
    """A score of one's own: every third module is worth nothing, the others less and less."""
    for i, module in enumerate(modules):
        worth = 1e-6 if i % 3 == 0 else 1.0
        module.ema.copy_(worth / torch.arange(1, len(module.ema) + 1))


def run(model, *, steps=24, total_steps=40, target_r=1.5, adapter=None, **settings):
    """Train for some steps; the freeze is at half of ``total_steps``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    settings = {"prune_interval": 1, "score": first_die, "target_r": target_r, **settings}
    allocator = RankAllocator(
        model, optimizer, total_steps=total_steps, adapter=adapter, **settings
    )
    inputs = batch(base)
    model.train()
    for _ in range(steps):
        output = model(**inputs)
        loss = output.loss if hasattr(output, "loss") else output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return allocator
