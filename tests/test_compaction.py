"""At the freeze dead components are gone, and nothing that trains, schedules or averages notices."""

import copy
import warnings

import bitsandbytes
import lion_pytorch
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_blockwise
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from dynlora import DynLoraConfig, RankAllocator, finalize_
from dynlora.adapter.components import find_gated_layers
from dynlora.adapter.patterns import plain_config
from dynlora.optimizer_state import cut_states
from small_net import adamw, adapted, attached, data, small_net, train
from tiny_models import adapted as adapted_llama
from tiny_models import batch

WIDTHS = (96, 128, 64, 32)
FREEZE = 10  # optimizer steps; runs have 20


def built_by(cls, **options):
    def build(model):
        return cls([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)

    return build


ELEMENTWISE = {
    "adamw": built_by(torch.optim.AdamW, foreach=False),
    "adamw foreach": built_by(torch.optim.AdamW, foreach=True),
    "adamw fused": built_by(torch.optim.AdamW, fused=True),
    "adamw amsgrad": built_by(torch.optim.AdamW, amsgrad=True),
    "sgd momentum": built_by(torch.optim.SGD, momentum=0.9),
    "lion": built_by(lion_pytorch.Lion),
    "bnb adamw": built_by(bitsandbytes.optim.AdamW),
    "bnb ademamix": built_by(bitsandbytes.optim.AdEMAMix),
}
FACTORED = {
    "adafactor of torch": built_by(torch.optim.Adafactor),
    "adafactor of transformers": built_by(
        transformers.Adafactor, scale_parameter=False, relative_step=False
    ),
}
EIGHT_BIT = {  # codes for every parameter, however small
    "bnb adamw 8 bit": built_by(bitsandbytes.optim.AdamW8bit, min_8bit_size=1),
    "bnb lion 8 bit": built_by(bitsandbytes.optim.Lion8bit, min_8bit_size=1),
}
OPTIMIZERS = ELEMENTWISE | FACTORED | EIGHT_BIT


def wide(**fields):
    """A net whose gates are a small part, so poor in ranks that modules end at 0."""
    fields = {"init_r": 4, "target_r": 1.3, "target_modules": ["0", "1", "2"], **fields}
    return get_peft_model(small_net(WIDTHS), DynLoraConfig(prune_interval=2, **fields))


def run(build, *, steps=20, model=None, micro_batches=1, autocast=False, each_step=None, **fields):
    """Train ``steps`` of a run of 20; returns model, optimizer, allocator and losses."""
    model = wide(**fields) if model is None else model
    optimizer = build(model)
    allocator = RankAllocator(model, optimizer, total_steps=20)
    x, y = data(width=WIDTHS[0], outputs=WIDTHS[-1])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for rows in torch.arange(len(x)).chunk(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = ((model(x[rows]) - y[rows]) ** 2).mean() / micro_batches
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        if each_step:
            each_step(model, optimizer)
    return model, optimizer, allocator, losses


def held_bytes(parameters, optimizer):
    """Bytes of parameters, gradients and optimizer state; what several share counts once."""
    tensors = [t for p in parameters for t in (p, p.grad)]
    tensors += [v for p in parameters for v in optimizer.state[p].values() if torch.is_tensor(v)]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


# -- what is left is a LoRA ----------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_of_a_lora_with_the_same_ranks_and_one_gate_a_component(name):
    model, optimizer, allocator, _ = run(OPTIMIZERS[name], steps=FREEZE)
    live = [m for m in allocator.layers if not m.is_dropped]
    gates = [m.gate for m in live]
    factors = [p for m in live for p in m.parameters[:2]]
    ours = held_bytes(factors, optimizer)
    config = plain_config(model, allocator.config, allocator.ranks())
    lora = get_peft_model(small_net(WIDTHS), config)
    plain = OPTIMIZERS[name](lora)
    train_once(lora, plain)
    assert ours == held_bytes([p for p in lora.parameters() if p.requires_grad], plain)
    assert sum(p.numel() for p in gates) == sum(allocator.ranks().values())
    assert held_bytes(factors + gates, optimizer) >= ours
    assert set(optimizer.state) == {*factors, *gates}


def train_once(model, optimizer):
    x, y = data(width=WIDTHS[0], outputs=WIDTHS[-1])
    ((model(x) - y) ** 2).mean().backward()
    optimizer.step()


def forward_flops(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(data(width=WIDTHS[0])[0])
    return counter.get_total_flops()


def test_a_forward_costs_what_the_same_lora_costs_and_rank_zero_costs_nothing():
    model, _, allocator, _ = run(ELEMENTWISE["adamw"], target_r=0.34)  # one component is left
    ranks = allocator.ranks()
    assert sorted(ranks.values()) == [0, 0, 1]
    lora = get_peft_model(small_net(WIDTHS), plain_config(model, allocator.config, ranks))
    assert forward_flops(model) == forward_flops(lora)
    rows, (inner, outer) = len(data()[0]), next(
        (m.layer.in_features, m.layer.out_features) for m in allocator.layers if not m.is_dropped
    )  # fmt: skip
    assert forward_flops(model) - forward_flops(small_net(WIDTHS)) == 2 * rows * (inner + outer)


# -- the losses do not notice --------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_compacted_run_has_the_losses_of_a_masked_one(name):
    masked = run(ELEMENTWISE[name], compact=False)[3]
    compacted = run(ELEMENTWISE[name])[3]
    assert compacted[:FREEZE] == masked[:FREEZE]
    torch.testing.assert_close(compacted, masked, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FACTORED | EIGHT_BIT)
def test_where_components_share_state_the_losses_stay_close(name):
    """A factored moment averages over dead rows; an 8-bit block spans neighbours."""
    masked = run(OPTIMIZERS[name], compact=False)[3]
    compacted = run(OPTIMIZERS[name])[3]
    assert compacted[:FREEZE] == masked[:FREEZE]
    torch.testing.assert_close(compacted, masked, rtol=0.05, atol=0)


def test_eight_bit_state_is_cut_to_within_half_a_code():
    old = nn.Parameter(torch.randn(12, 100))
    optimizer = bitsandbytes.optim.AdamW8bit([old], lr=1e-2, min_8bit_size=1)
    old.grad = torch.randn_like(old)
    optimizer.step()
    state, keep = optimizer.state[old], torch.tensor([1, 5, 6, 11])
    cut = cut_states(state, old, keep, 0)
    assert list(cut) == list(state)
    assert cut["step"] == state["step"]
    for i in "12":
        before, after = (
            dequantize_blockwise(
                s[f"state{i}"], absmax=s[f"absmax{i}"], code=s[f"qmap{i}"], blocksize=256
            )
            for s in (state, cut)
        )
        assert after.shape == (4, 100)
        scale = before.abs().max()
        half_a_code = state[f"qmap{i}"].diff().max() / 2
        nearly = 1.01  # bitsandbytes takes a neighbour where two codes are as near to 0.2 %
        assert (after - before[keep]).abs().max() <= nearly * scale * half_a_code


def test_eight_bit_state_of_which_nothing_is_cut_stays_as_it_is():
    old = nn.Parameter(torch.randn(12, 100))
    optimizer = bitsandbytes.optim.AdamW8bit([old], lr=1e-2, min_8bit_size=1)
    old.grad = -torch.rand_like(
        old
    )  # the book has no code for -1: encoding anew would shrink maxima
    optimizer.step()
    state = optimizer.state[old]
    whole = cut_states(state, old, torch.arange(12), 0)
    assert list(whole) == list(state)
    assert all(torch.equal(torch.as_tensor(whole[k]), torch.as_tensor(state[k])) for k in state)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_gradients_accumulate_across_the_freeze(micro_batches):
    masked = run(ELEMENTWISE["adamw"], compact=False, micro_batches=micro_batches)
    compacted = run(ELEMENTWISE["adamw"], micro_batches=micro_batches)
    assert compacted[2].step == 20
    torch.testing.assert_close(compacted[3], masked[3], rtol=1e-6, atol=0)


def test_a_gradient_that_is_kept_over_the_freeze_is_cut_with_its_parameter():
    _, _, allocator, _ = run(ELEMENTWISE["adamw"], steps=FREEZE)
    for gated in allocator.layers:
        for p in () if gated.is_dropped else gated.parameters:
            assert p.grad.shape == p.shape
            assert bool(p.grad.any())


def test_bf16_autocast_stays_close_and_keeps_fp32_weights_and_state():
    masked = run(ELEMENTWISE["adamw"], compact=False, autocast=True)[3]
    model, optimizer, _, compacted = run(ELEMENTWISE["adamw"], autocast=True)
    assert compacted[:FREEZE] == masked[:FREEZE]
    torch.testing.assert_close(compacted, masked, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_ends_at_the_same_weights(use_reentrant):
    ends = []
    for is_checkpointed in (False, True):
        model = adapted_llama().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        optimizer = adamw(model)
        allocator = RankAllocator(model, optimizer, total_steps=20)
        for _ in range(20):
            model(**batch(model.get_base_model())).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.is_gradient_checkpointing == is_checkpointed
        assert 0 in allocator.ranks().values()
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_compiled_once_more_at_most(in_place):
    expected = run(ELEMENTWISE["adamw"], target_r=0.34)[3]
    torch._dynamo.reset()
    counter, model = CompileCounter(), wide(target_r=0.34)
    if in_place:
        model.compile(backend=counter, fullgraph=True)
    else:
        model = torch.compile(model, backend=counter, fullgraph=True)
    before = []
    _, _, allocator, losses = run(
        ELEMENTWISE["adamw"],
        model=model,
        each_step=lambda *_: before.append(counter.frame_count),
    )
    assert before[FREEZE - 1] == 1
    assert counter.frame_count == 2
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert 0 in allocator.ranks().values()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_code_gives_the_losses_of_the_eager_model():
    expected = run(ELEMENTWISE["adamw"])[3]
    torch._dynamo.reset()
    losses = run(ELEMENTWISE["adamw"], model=torch.compile(wide()))[3]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


# -- groups, schedulers, averages ----------------------------------------------------------------


def grouped(model):
    """LoRA+ and more: each kind of factor and each module has its own learning rate."""
    layers = find_gated_layers(model, "default")
    groups = [
        {"params": [p], "lr": 1e-3 * (1 + i) * (1 + kind), "weight_decay": 0.1 * kind}
        for i, gated in enumerate(layers)
        for kind, p in enumerate(gated.parameters)
    ]
    return torch.optim.AdamW(groups)


def test_each_parameter_stays_in_its_group_and_emptied_groups_do_no_harm():
    masked = run(grouped, compact=False, target_r=0.34)
    _, optimizer, allocator, losses = run(grouped, target_r=0.34)
    torch.testing.assert_close(losses, masked[3], rtol=1e-6, atol=0)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in masked[1].param_groups]
    for i, gated in enumerate(allocator.layers):
        for kind in range(3):
            inside = optimizer.param_groups[3 * i + kind]["params"]
            expected = [] if gated.is_dropped else [gated.parameters[kind]]
            assert list(map(id, inside)) == list(map(id, expected))


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=20),
    "warm-up, then linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 5, 20),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_learning_rate_schedule_runs_on_across_the_freeze(schedule):
    results = []
    for compact in (False, True):
        rates, schedulers = [], {}

        def step(_, optimizer, rates=rates, schedulers=schedulers):
            rates.append(optimizer.param_groups[0]["lr"])
            schedulers.setdefault("its", SCHEDULES[schedule](optimizer)).step()

        with warnings.catch_warnings():  # the schedule is built after the first step, on purpose
            warnings.simplefilter("ignore", UserWarning)
            losses = run(ELEMENTWISE["adamw"], compact=compact, each_step=step)[3]
        assert len(set(rates)) > 10
        results.append((rates, losses))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)


AVERAGES = {
    "swa": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema of buffers too": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}


def averaged_run(options, *, compact):
    """An averaged copy from step 1 on, and its outputs before and after it becomes a plain LoRA."""
    model = wide(compact=compact)
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, total_steps=20)
    average = AveragedModel(model, **options)
    allocator.also_compact(average)
    x, y = data(width=WIDTHS[0], outputs=WIDTHS[-1])
    for _ in range(20):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        average.update_parameters(model)
    before = average(x)
    assert finalize_(average) == allocator.ranks()
    torch.testing.assert_close(average(x), before, rtol=0, atol=1e-5)
    assert (before - model(x)).abs().max() > 1e-3
    return before


@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_follow_across_the_freeze(name):
    compacted = averaged_run(AVERAGES[name], compact=True)
    masked = averaged_run(AVERAGES[name], compact=False)
    torch.testing.assert_close(compacted, masked, rtol=0, atol=1e-6)


def test_averaged_weights_saved_after_the_freeze_load_into_a_new_average():
    model, optimizer, allocator = attached(total_steps=20, target_r=1)
    average = AveragedModel(model)
    allocator.also_compact(average)
    train(model, optimizer, 12)
    average.update_parameters(model)
    other = AveragedModel(adapted(target_r=1, seed=5))
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    train(model, optimizer, 2)
    other.update_parameters(model)
    average.update_parameters(model)
    expected, found = average.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected if "lora_" in k)


def test_a_copy_of_another_model_is_refused():
    _, _, allocator = attached()
    for other in (AveragedModel(small_net()), AveragedModel(adapted(init_r=5))):
        with pytest.raises(ValueError, match=r"copy=AveragedModel does not hold adapter 'default'"):
            allocator.also_compact(other)


# -- what cannot be carried over keeps its place -------------------------------------------------


def masked_to_the_end(match, build=adamw, before=None):
    model, optimizer, allocator = attached(total_steps=6, optimizer=build)
    if before:
        before(allocator)
    x, y = data()

    def closure():
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=f"keep their place until finalize_: {match}"):
        losses = [optimizer.step(closure).item() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(m.num_components == 4 for m in allocator.layers)
    expected = allocator.ranks()
    assert allocator.finalize_() == expected
    assert sum(expected.values()) == allocator.target_components


def test_an_optimizer_with_a_parameter_list_of_its_own_keeps_training_the_right_ones():
    masked_to_the_end(
        "(optimizer LBFGS keeps a list of parameters|optimizer state)",
        lambda m: torch.optim.LBFGS([p for p in m.parameters() if p.requires_grad], lr=0.1),
    )


class NotesParameters(torch.optim.SGD):
    """Steps what it noted down at the start, as LBFGS does, and keeps no state to refuse."""

    def __init__(self, model):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=0.1)
        self.noted = list(self.param_groups[0]["params"])


def test_an_optimizer_that_noted_its_parameters_down_is_found_out():
    masked_to_the_end(
        "optimizer NotesParameters keeps a list of.* its own, 'noted'", NotesParameters
    )


def test_a_factor_with_a_hook_keeps_its_place_and_its_hook():
    calls = []
    masked_to_the_end(
        "a factor of module 'layers.1' of shape .* has hooks",
        before=lambda a: a.layers[1].parameters[1].register_hook(lambda _: calls.append(1)),
    )
    assert len(calls) == 6


class Coded(torch.Tensor):
    """Stands for the quantised state of other libraries."""


def test_state_in_a_tensor_class_of_another_library_is_refused():
    with pytest.raises(TypeError, match="'exp_avg' is a Coded, whose parts cannot be taken out"):
        cut_states({"exp_avg": torch.ones(3, 4).as_subclass(Coded)}, torch.ones(3, 4),
                   torch.tensor([0]), 0)  # fmt: skip
