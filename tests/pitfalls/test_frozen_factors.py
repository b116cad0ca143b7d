"""Adapters of which PEFT trains one factor only: MiCA freezes B, LoRA-FA freezes A."""

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer

from dynlora import RankAllocator
from lora_runs import ENDS, SETTINGS, adapted, base, ids, logits, ranks_of, train

FINAL = sorted(r for r in ENDS if r)


def test_a_mica_adapter_is_scored_by_a_and_pruned_in_a(tmp_path):
    model = adapted(init_lora_weights="mica")
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}
    settings = {"score": None, "target_r": 2.0}
    allocator, _ = train(model, steps=4, **settings)  # cuts have begun, nothing is removed yet
    assert all(bool(m.ema.any()) for m in allocator.modules)
    assert any(not bool(m.live.all()) for m in allocator.modules)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if "lora_B" in n)
    for module in allocator.modules:
        a, b = module.pairs[0]
        assert not a.parameter[~module.live].any()
        assert b.parameter[:, ~module.live].any() or bool(module.live.all())


def test_a_finished_mica_adapter_loads_in_stock_peft(tmp_path):
    model = adapted(init_lora_weights="mica")
    train(model)[0].finalize_()
    assert sorted(ranks_of(model).values()) == FINAL
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_lora_fa_keeps_its_a_and_loses_components(tmp_path):
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    allocator = RankAllocator(model, optimizer, total_steps=10, **SETTINGS)
    first = {m.name: m.pairs[0][0].parameter.clone() for m in allocator.modules}
    for step in range(10):
        loss = model(input_ids=ids(step), labels=ids(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    allocator.finalize_()
    assert sorted(ranks_of(model).values()) == FINAL
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["names"]) == len(group["scaling_factors"])
    for module in allocator.present:
        kept = module.pairs[0][0].parameter
        assert torch.equal(kept, first[module.name][: len(kept)])


def test_names_of_parameters_in_the_optimizer_stay_with_their_parameters():
    model = adapted()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.items(), lr=1e-2)
    allocator = RankAllocator(model, optimizer, total_steps=10, **SETTINGS)
    for step in range(10):
        loss = model(input_ids=ids(step), labels=ids(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    group = optimizer.param_groups[0]
    assert len(allocator.present) == len(FINAL)
    assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
