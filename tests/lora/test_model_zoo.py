"""The whole life of an adapter, on every architecture that is fine-tuned a lot."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dynlora import RankAllocator
from zoo import ZOO

STEPS = 10
BEFORE_FREEZE, AFTER_FREEZE = 3, 7

in_the_zoo = pytest.mark.parametrize(
    "species",
    [pytest.param(s, id=s.name, marks=[pytest.mark.slow] if s.is_slow else []) for s in ZOO],
)


def fresh(species):
    fields = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "lora_dropout": 0.1}
    return get_peft_model(species.build(), LoraConfig(**{**fields, **species.adapter}))


def attached(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    settings = {"target_r": 0.9, "prune_interval": 2}
    return optimizer, RankAllocator(model, optimizer, total_steps=STEPS, **settings)


def train(model, species, optimizer, steps):
    """Steps of one run; each draws its dropout from its own number."""
    model.train()
    inputs = species.inputs()
    for step in steps:
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def outputs(model, species):
    return model.eval()(**species.inputs())[species.output]


@in_the_zoo
@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT, of attention at rank 0
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT looks at modules only
def test_a_run_resumes_to_the_bit_and_ends_as_a_plain_lora_of_the_target_size(species, tmp_path):
    model = fresh(species)
    optimizer, allocator = attached(model)
    saved, at = {}, 0
    for stop in (BEFORE_FREEZE, AFTER_FREEZE, STEPS):
        train(model, species, optimizer, range(at, stop))
        state = model.state_dict(), optimizer.state_dict(), allocator.state_dict()
        saved[stop], at = copy.deepcopy(state), stop
    assert allocator.cost <= allocator.target_cost
    live = zip(allocator.modules, allocator.ranks().values(), strict=True)
    assert [m.rank for m in allocator.modules] == [rank or (not m.can_drop) for m, rank in live]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trainable)) == sorted(map(id, optimizer.state))
    for stop in (BEFORE_FREEZE, AFTER_FREEZE):
        again = fresh(species)  # by the unchanged script
        optimizer, resumed = attached(again)
        for part, state in zip((again, optimizer, resumed), saved[stop], strict=True):
            part.load_state_dict(state)
        train(again, species, optimizer, range(stop, STEPS))
        assert resumed.ranks() == allocator.ranks()
        whole, parts = model.state_dict(), again.state_dict()
        torch.testing.assert_close(parts, whole, rtol=0, atol=species.drift)
    before = outputs(model, species)
    assert (before - outputs(species.build(), species)).abs().max() > 1e-4
    allocator.finalize_()
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(species.build(), tmp_path)
    for one in (model, stock):
        torch.testing.assert_close(outputs(one, species), before, rtol=0, atol=1e-5)
