"""Every kind of layer that PEFT's LoRA adapts goes all the way to a small plain LoRA, and to rank 0."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from dynlora import RankAllocator
from dynlora.lora.components import find_components
from tiny_models import EXPERTS, KINDS, adapted, batch, layer_kinds, logits, tiny_experts, train

FP32 = {"rtol": 0, "atol": 1e-5}  # slices reorder sums of fp32 numbers
pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "fan_in_fan_out is set to",
        "Already unmerged",  # attention of rank 0, at each forward
        "The following .*_pattern keys did not match",  # it looks at modules, not at parameters
        "Adapter 'default'. . LoRA tensor.* have invalid shape",  # it forgets lora_bias
    )
]

CASES = {
    **{kind: (layer_kinds, {"target_modules": [kind]}) for kind in KINDS},
    "all": (layer_kinds, {"target_modules": list(KINDS)}),
    "with a bias in B": (layer_kinds, {"target_modules": ["conv2d", "linear"], "lora_bias": True}),
    "with trained biases": (layer_kinds, {"target_modules": ["conv1d", "linear"], "bias": "all"}),
    "rslora": (layer_kinds, {"target_modules": ["conv1d", "linear"], "use_rslora": True}),
    "experts": (tiny_experts, {"target_parameters": EXPERTS, "target_modules": None}),
    "experts and attention": (
        tiny_experts, {"target_parameters": EXPERTS, "target_modules": ["q_proj", "v_proj"]}
    ),
}  # fmt: skip


def equal(found, expected):
    torch.testing.assert_close(found, expected, **FP32)


def size(model):
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def reloaded(build, folder):
    return PeftModel.from_pretrained(build(), folder)


@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_as_a_plain_lora_of_the_target_size(tmp_path, name):
    build, fields = CASES[name]
    model = adapted(build, **fields)
    whole = size(model)
    allocator = train(model, lr=5e-2, target_r=2)
    before = logits(model)
    assert (before - logits(build())).abs().max() > 1e-3
    ranks = allocator.finalize_()
    equal(logits(model), before)
    assert allocator.cost <= allocator.target_cost
    held = sum(m.component_size * m.rank for m in allocator.present)
    biases = sum(p.numel() for n, p in model.named_parameters() if ".bias" in n and "lora_B" in n)
    assert size(model) == held + biases < whole
    model.save_pretrained(tmp_path)
    stock = reloaded(build, tmp_path)
    assert {type(m).__module__.partition(".")[0] for m in layers(stock)} == {"peft"}
    equal(logits(stock), before)
    assert {m.name: m.rank for m in find_components(stock, "default")} == {
        name: max(rank, 0 if not _keeps(allocator, name) else 1) for name, rank in ranks.items()
        if rank or _keeps(allocator, name)
    }  # fmt: skip
    if not fields.get("target_parameters"):
        equal(logits(stock.merge_and_unload()), before)


def _keeps(allocator, name):
    return not next(m for m in allocator.modules if m.name == name).can_drop


def layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


DROPS = {
    **{kind: kind for kind in KINDS},
    "experts": "model.layers.0.mlp.experts.down_proj",
    "with a bias in B": "linear",
}


@pytest.mark.parametrize("name", DROPS)
def test_each_kind_can_fall_to_rank_0_and_come_back(tmp_path, name):
    build, fields = CASES["all" if name in KINDS else name]
    model = adapted(build, **fields)
    allocator = train(model, steps=5, total_steps=12, lr=5e-2, target_r=2)
    saved, earlier = copy.deepcopy(model.state_dict()), logits(model)
    for module in allocator.modules:
        if module.name == DROPS[name]:
            module.ema.fill_(-1)
            dead = module
    allocator.freeze_()
    assert allocator.ranks()[dead.name] == 0
    assert dead.is_dropped == dead.can_drop == (name in KINDS)
    assert dead.rank == (0 if name in KINDS else 1)
    model.save_pretrained(tmp_path)
    before = logits(model)
    equal(logits(reloaded(build, tmp_path)), before)
    model.load_state_dict(saved)  # as a run that goes back to its best checkpoint
    equal(logits(model), earlier)
    assert dead.rank == 4
    with pytest.warns(UserWarning, match="weights are of a checkpoint from before the freeze"):
        ranks = allocator.finalize_()
    assert set(ranks.values()) == {4}
    equal(logits(model), earlier)


@pytest.mark.parametrize("name", ["all", "experts and attention", "with a bias in B"])
def test_each_kind_resumes_bit_for_bit_in_a_model_of_the_unchanged_script(name):
    build, fields = CASES[name]
    runs = []
    for stop in (12, 5, 9):
        model, optimizer, allocator = attached(build, fields)
        steps(model, optimizer, stop)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), allocator.state_dict()))
        if stop < 12:
            model, optimizer, allocator = attached(build, fields)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            allocator.load_state_dict(saved[2])
            steps(model, optimizer, 12 - stop)
        runs.append(model.state_dict())
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        for (
            key,
            value,
        ) in other.items():  # PEFT adds ΔW of attention to its weights and subtracts it
            tolerance = {"rtol": 0, "atol": 1e-4 if "mha" in str(fields) else 0}
            torch.testing.assert_close(value, runs[0][key], **tolerance)


def attached(build, fields):
    model = adapted(build, **fields)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    allocator = RankAllocator(model, optimizer, total_steps=12, target_r=1, prune_interval=2)
    return model, optimizer, allocator


def steps(model, optimizer, count):
    inputs = batch(model.get_base_model())
    for _ in range(count):
        output = model(**inputs)
        loss = output.square().mean() if torch.is_tensor(output) else output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_slot_of_experts_is_removed_from_all_of_them_at_once():
    model = adapted(tiny_experts, target_parameters=EXPERTS, target_modules=None)
    allocator = train(model, target_r=2)
    for module in allocator.present:
        a, b = module.pairs[0]
        assert a.parameter.shape[0] == 3 * module.rank == b.parameter.shape[1]


def test_components_are_counted_once_where_two_layers_share_a_rank():
    model = adapted(layer_kinds, target_modules=["mha"])
    (module,) = find_components(model, "default")
    assert len(module.pairs) == 2
    assert module.component_size == 8 + 3 * 8 + 8 + 8  # in_proj and out_proj


def test_a_layer_that_is_no_lora_layer_is_left_alone():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model = get_peft_model(net, LoraConfig(target_modules=["0"], r=2))
    assert [m.name for m in find_components(model, "default")] == ["0"]
