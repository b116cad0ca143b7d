"""At the freeze dead components are gone, and nothing that trains, schedules or averages notices."""

import copy
import warnings
from typing import NamedTuple

import bitsandbytes
import lion_pytorch
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_blockwise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from dynlora import CannotShrinkError, finalize_
from dynlora.allocator.optimizer_state import cut_states
from dynlora.fused import fuse_
from dynlora.lora.components import find_components
from small_net import TARGETS, adamw, adapted, allocated, attached, data, small_net, train
from tiny_models import BUDGET, batch
from tiny_models import adapted as adapted_llama

WIDTHS = (96, 128, 64, 32)
FREEZE = 10  # optimizer steps; runs have 20


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def built_by(cls, **options):
    def build(model):
        return cls(trainable(model), lr=1e-2, **options)

    return build


class Moments(NamedTuple):
    first: torch.Tensor
    others: list


class KeepsNested(torch.optim.Optimizer):
    """Momentum in a list, a dict and a NamedTuple at once, as SOAP and PSGD keep theirs."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["list"] = [torch.zeros_like(p), 3]
                    state["dict"] = {"inner": (torch.zeros_like(p),)}
                    state["named"] = Moments(torch.zeros_like(p), ["a name", None])
                for moment in (state["list"][0], state["dict"]["inner"][0], state["named"].first):
                    moment.lerp_(p.grad, 0.1)
                    p.data.add_(moment, alpha=-group["lr"])


ELEMENTWISE = {
    "adamw": built_by(torch.optim.AdamW, foreach=False),
    "adamw foreach": built_by(torch.optim.AdamW, foreach=True),
    "adamw fused": built_by(torch.optim.AdamW, fused=True),
    "adamw amsgrad": built_by(torch.optim.AdamW, amsgrad=True),
    "sgd momentum": built_by(torch.optim.SGD, momentum=0.9),
    "lion": built_by(lion_pytorch.Lion),
    "bnb adamw": built_by(bitsandbytes.optim.AdamW),
    "bnb ademamix": built_by(bitsandbytes.optim.AdEMAMix),
    "nested state": built_by(KeepsNested),
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


def run(
    build, *, steps=20, model=None, micro_batches=1, autocast=False, each_step=None, also=None,
    **fields,
):  # fmt: skip
    """Train ``steps`` of a run of 20, so poor in ranks that modules end at 0."""
    fields = {"target_r": 0.5, "prune_interval": 2, "widths": WIDTHS, **fields}
    model = adapted(**fields) if model is None else model
    optimizer = build(model)
    allocator = allocated(model, optimizer, total_steps=20, **fields)
    if also:
        also(model, optimizer, allocator)
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


def tensors_in(value):
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    return []


def held_bytes(parameters, optimizer):
    """Bytes of parameters, gradients and optimizer state; what several share counts once."""
    tensors = [t for p in parameters for t in (p, p.grad, *tensors_in(optimizer.state[p]))]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


# -- what is left is a LoRA ----------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_of_a_lora_with_the_same_ranks(name):
    model, optimizer, allocator, _ = run(OPTIMIZERS[name], steps=FREEZE)
    assert 0 in allocator.ranks().values()
    lora = get_peft_model(small_net(WIDTHS), copy.deepcopy(model.peft_config["default"]))
    plain = OPTIMIZERS[name](lora)
    x, y = data(width=WIDTHS[0], outputs=WIDTHS[-1])
    ((lora(x) - y) ** 2).mean().backward()
    plain.step()
    ours, theirs = trainable(model), trainable(lora)
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    assert held_bytes(ours, optimizer) == held_bytes(theirs, plain)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in ours} == {id(p) for p in optimizer.state}


@pytest.mark.parametrize("gated", [False, True])
def test_parameters_keep_their_identity_when_they_shrink(gated):
    noted = []
    model, *_ = run(
        ELEMENTWISE["adamw"], gated=gated, also=lambda m, *_: noted.extend(trainable(m))
    )
    assert {id(p) for p in trainable(model)} < {id(p) for p in noted}


@pytest.mark.parametrize("gated", [False, True])
def test_clipping_by_a_list_noted_before_clips_what_is_trained(gated):
    losses = []
    for compact in (False, True):
        noted = []
        losses.append(
            run(
                ClipsFirst.around(noted), compact=compact, gated=gated,
                also=lambda m, *_, noted=noted: noted.extend(trainable(m)),
            )[3]
        )  # fmt: skip
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert losses[0] != run(ELEMENTWISE["sgd momentum"], gated=gated)[3]


class ClipsFirst(torch.optim.SGD):
    """Clips the gradients of a list of its user's before each step."""

    @classmethod
    def around(cls, noted):
        def build(model):
            optimizer = cls(trainable(model), lr=1e-2, momentum=0.9)
            optimizer.clipped = noted
            return optimizer

        return build

    def step(self, closure=None):
        norm = nn.utils.clip_grad_norm_(self.clipped, 1e-3)
        assert norm > 1e-3
        return super().step(closure)


def forward_flops(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(data(width=WIDTHS[0])[0])
    return counter.get_total_flops()


@pytest.mark.parametrize("gated", [False, True])
def test_a_forward_costs_what_the_ranks_cost_and_rank_zero_costs_nothing(gated):
    model, _, allocator, _ = run(ELEMENTWISE["adamw"], gated=gated)
    assert 0 in allocator.ranks().values()
    extra = 2 * len(data()[0]) * sum(m.component_size * m.rank for m in allocator.present)
    assert forward_flops(model) - forward_flops(small_net(WIDTHS)) == extra


def test_compaction_survives_a_living_graph():
    """Data of another shape, put into a parameter that a graph still holds, would break backward."""
    model, optimizer, _ = attached(total_steps=20)
    x, _ = data()
    train(model, optimizer, 4)
    kept_alive = model(x).sum()
    train(model, optimizer, 10)
    model(x).sum().backward()
    train(model, optimizer, 2)
    del kept_alive


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
    old.grad = -torch.rand_like(old)  # no code for -1: encoding anew would shrink maxima
    optimizer.step()
    state = optimizer.state[old]
    whole = cut_states(state, old, torch.arange(12), 0)
    assert list(whole) == list(state)
    assert all(torch.equal(torch.as_tensor(whole[k]), torch.as_tensor(state[k])) for k in state)


def test_gradients_accumulate_across_the_freeze():
    masked = run(ELEMENTWISE["adamw"], compact=False, micro_batches=4)
    compacted = run(ELEMENTWISE["adamw"], micro_batches=4)
    assert compacted[2].step == 20
    torch.testing.assert_close(compacted[3], masked[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_a_gradient_that_is_kept_over_the_freeze_is_cut_with_its_parameter(gated):
    _, _, allocator, _ = run(ELEMENTWISE["adamw"], steps=FREEZE, gated=gated)
    for parameter in (f.parameter for m in allocator.present for f in m.factors):
        assert parameter.grad.shape == parameter.shape
        assert bool(parameter.grad.any())


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
        allocator = allocated(model, optimizer, total_steps=20, **BUDGET)
        for _ in range(20):
            model(**batch(model.get_base_model())).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.is_gradient_checkpointing == is_checkpointed
        assert 0 in allocator.ranks().values()
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_compiled_model_is_compiled_once_more_at_most(in_place, is_fused):
    """In one graph before the freeze, and in one after it."""
    expected = run(ELEMENTWISE["adamw"])[3]
    torch._dynamo.reset()
    counter, model = CompileCounter(), adapted(widths=WIDTHS)
    assert not is_fused or fuse_(model) > 0
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
    losses = run(ELEMENTWISE["adamw"], model=torch.compile(adapted(widths=WIDTHS)))[3]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


# -- groups, schedulers, averages ----------------------------------------------------------------


def grouped(model):
    """LoRA+ and more: each kind of factor and each module has its own learning rate."""
    groups = [
        {
            "params": [f.parameter],
            "lr": 1e-3 * (1 + i) * (1 + 8 * f.dim),
            "weight_decay": 0.1 * f.dim,
        }
        for i, module in enumerate(find_components(model, "default"))
        for f in module.factors
    ]
    return torch.optim.AdamW(groups)


def test_each_parameter_stays_in_its_group_and_emptied_groups_do_no_harm():
    masked = run(grouped, compact=False)
    _, optimizer, allocator, losses = run(grouped)
    torch.testing.assert_close(losses, masked[3], rtol=1e-6, atol=0)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in masked[1].param_groups]
    inside = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    expected = [
        [] if m.is_dropped else [id(m.factors[kind].parameter)]
        for m in allocator.modules
        for kind in (0, 1)
    ]
    assert inside == expected
    assert [] in inside


SCHEDULES = {
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


def averaged_run(options, **fields):
    """An averaged copy from step 1 on, and its outputs before and after the end."""
    averages = []

    def follow(model, _optimizer, allocator):
        averages.append(AveragedModel(model, **options))
        allocator.also_compact(averages[0])

    model, _, allocator, _ = run(
        ELEMENTWISE["adamw"], also=follow,
        each_step=lambda m, _: averages[0].update_parameters(m), **fields,
    )  # fmt: skip
    average, x = averages[0], data(width=WIDTHS[0])[0]
    before = average(x)
    if fields.get("compact", True) or fields.get("gated"):
        assert finalize_(average) == {n: r for n, r in allocator.ranks().items() if r} or (
            fields.get("gated")
        )
    torch.testing.assert_close(average(x), before, rtol=0, atol=1e-5)
    assert (before - model(x)).abs().max() > 1e-3
    assert 0 in allocator.ranks().values()
    return before


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_follow_across_the_freeze(name, gated):
    compacted = averaged_run(AVERAGES[name], compact=True, gated=gated)
    masked = averaged_run(AVERAGES[name], compact=False, gated=gated)
    torch.testing.assert_close(compacted, masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_freezing_by_hand_cuts_an_averaged_copy_too(gated):
    model, optimizer, allocator = attached(gated=gated, target_r=0.5)
    average = AveragedModel(model)
    allocator.also_compact(average)
    train(model, optimizer, 5)
    average.update_parameters(model)
    allocator.freeze_()
    average.update_parameters(model)
    train(model, optimizer, 2)
    average.update_parameters(model)
    assert [p.shape for p in trainable(average)] == [p.shape for p in trainable(model)]


def test_averaged_weights_saved_after_the_freeze_load_into_a_new_average():
    model, optimizer, allocator = attached(total_steps=20, target_r=0.5)
    average = AveragedModel(model)
    allocator.also_compact(average)
    train(model, optimizer, 12)
    average.update_parameters(model)
    assert 0 in allocator.ranks().values()
    fresh = adapted(seed=5)
    allocated(fresh, adamw(fresh), total_steps=20, target_r=0.5)
    fresh.load_state_dict(model.state_dict())  # follows the ranks
    other = AveragedModel(fresh)
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    train(model, optimizer, 2)
    for one in (other, average):
        one.update_parameters(model)
    expected, found = average.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected if "lora_" in k)


def test_a_copy_of_another_model_is_refused():
    _, _, allocator = attached()
    with pytest.raises(ValueError, match=r"copy=AveragedModel does not hold adapter 'default'"):
        allocator.also_compact(AveragedModel(adapted(r=5)))


class LooksAhead(torch.optim.SGD):
    """Lookahead: every third step the weights go halfway back to slow ones, kept where ``keep`` says."""

    def __init__(self, model, keep):
        super().__init__(trainable(model), lr=0.1)
        self.keep, self.count, self.outside = keep, 0, {}

    def step(self, closure=None):
        super().step(closure)
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            holder = self.state[p] if self.keep == "state" else self.outside.setdefault(p, {})
            slow = holder.setdefault("slow", p.detach().clone())
            if self.count % 3 == 0:
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)


def test_slow_weights_in_the_optimizers_state_shrink_with_the_fast_ones():
    losses = [
        run(lambda m: LooksAhead(m, "state"), compact=compact)[3] for compact in (False, True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_slow_weights_kept_elsewhere_fail_aloud():
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda m: LooksAhead(m, "elsewhere"))


# -- what cannot be carried over keeps its place -------------------------------------------------


def masked_to_the_end(match, build):
    model, optimizer, allocator = attached(total_steps=14, optimizer=build, target_r=0.5)
    x, y = data()

    def closure():
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=f"keep their place until finalize_: {match}"):
        losses = [optimizer.step(closure).item() for _ in range(14)]
    assert losses[-1] < losses[0]
    assert [m.rank for m in allocator.modules] == [4, 4, 4]
    expected = allocator.ranks()
    assert 0 in expected.values()
    before = model(x)
    assert allocator.finalize_() == expected
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in trainable(model)) <= 0.5 * 34


def test_an_optimizer_that_keeps_flat_state_goes_on_with_all_shapes():
    masked_to_the_end(
        "optimizer state .* cannot be cut",
        lambda m: torch.optim.LBFGS(trainable(m), lr=0.1, max_iter=2),
    )


class KeepsOddState(torch.optim.SGD):
    """An optimizer with a state tensor that belongs to no component, somewhere."""

    def __init__(self, model, odd):
        super().__init__(trainable(model), lr=0.1)
        self.odd = odd

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = self.odd()
        return loss


class Coded(torch.Tensor):
    """Stands for the quantised state of other libraries."""


class Opaque:
    """Could hold anything."""


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda: torch.zeros(17), r"optimizer state 'odd' of shape \(17,\)"),
        (lambda: [torch.zeros(17)], r"optimizer state 'odd\[0\]' of shape \(17,\)"),
        (lambda: {"q": (1, torch.zeros(3, 17))}, r"optimizer state 'odd.q\[1\]' of shape \(3, 17\)"),
        (lambda: Moments(torch.zeros(17), []), r"optimizer state 'odd\[0\]' of shape"),
        (lambda: torch.ones(4, 4).as_subclass(Coded), "optimizer state 'odd' is a Coded, whose parts"),
        (Opaque, "optimizer state 'odd' is a Opaque, which may hold tensors"),
    ],
)  # fmt: skip
def test_state_that_says_nothing_about_components_is_never_guessed(odd, message):
    masked_to_the_end(message, lambda m: KeepsOddState(m, odd))


def test_the_refusal_is_one_of_this_packages_errors():
    with pytest.raises(CannotShrinkError, match="cannot be cut with its parameter"):
        cut_states({"odd": torch.zeros(17)}, torch.ones(3, 4), torch.tensor([0]), 0)


def test_a_hook_of_the_users_on_a_factor_stays_and_is_called():
    model, optimizer, allocator = attached(total_steps=14)
    calls = []
    allocator.modules[1].factors[1].parameter.register_hook(lambda g: calls.append(g.shape[1]))
    train(model, optimizer, 14)
    assert len(calls) == 14
    assert calls[0] == 4 > calls[-1] == allocator.ranks()["layers.1"] > 0


def test_an_orthogonal_start_shrinks_and_loads_at_odd_ranks(tmp_path):
    model, optimizer, allocator = attached(
        total_steps=20, target_r=1, init_lora_weights="orthogonal"
    )
    train(model, optimizer, 20)
    before = model(data()[0])
    assert any(rank % 2 for rank in allocator.finalize_().values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_net(), str(tmp_path))
    torch.testing.assert_close(loaded(data()[0]), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_rewrites_the_base_keeps_its_shapes_and_says_so(start, tmp_path):
    model, optimizer, allocator = attached(
        total_steps=20, target_r=0.5, init_lora_weights=start, r=2
    )
    with pytest.warns(UserWarning, match=f"init_lora_weights='{start}' changed the base weights"):
        train(model, optimizer, 20)
    assert [m.rank for m in allocator.modules] == [2, 2, 2]
    before = model(data()[0])
    ranks = allocator.finalize_()
    assert 0 in ranks.values()
    assert torch.equal(model(data()[0]), before)
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.rank_pattern, config.target_modules) == (2, {}, set(TARGETS))
