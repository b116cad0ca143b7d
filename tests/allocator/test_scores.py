"""Scoring and DEM cost little: few operations, small temporaries, no waiting for the device."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dynlora import DynLoraConfig, RankAllocator
from dynlora.allocator.dem import add_dem_to_gradients_
from dynlora.allocator.scores import gram_matrices
from dynlora.allocator.stacks import ON_CPU, Limits
from small_net import adamw, small_net, train

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}


class Watch(TorchDispatchMode):
    """Names of the operations that compute something, and the largest new tensor's bytes."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name in {"aten::detach", "aten::alias"}:
            return result
        self.names.append(func._schema.name)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.largest = max(self.largest, storage.nbytes())
        return result


def many(modules, *, width=8, out=8, dtype=torch.float32, rank=6, gated=False):
    net = nn.Sequential(*(nn.Linear(width, out, dtype=dtype) for _ in range(modules)))
    names = [str(i) for i in range(modules)]
    if gated:
        return get_peft_model(net, DynLoraConfig(target_modules=names, init_r=rank, target_r=1))
    return get_peft_model(net, LoraConfig(target_modules=names, r=rank))


def with_gradients(model, **settings):
    optimizer = adamw(model)
    if not isinstance(model.peft_config["default"], DynLoraConfig):
        settings.setdefault("target_r", 1)
    allocator = RankAllocator(model, optimizer, total_steps=1000, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return optimizer, allocator


def one_step(allocator, watch, *, has_dem=False):
    """What the allocator does around one optimizer step."""
    with watch:
        allocator.score.before_step(allocator.modules, None)
        if has_dem:
            add_dem_to_gradients_(allocator.modules, factor=0.1)
        allocator.score(allocator.modules, 1)
    return watch


def tensors_of(allocator):
    for m in allocator.modules:
        for factor in m.factors:
            yield factor.parameter
            yield factor.parameter.grad
        yield m.ema


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_grams_are_the_inner_products(monkeypatch, dtype, count):
    monkeypatch.setattr("dynlora.allocator.stacks.ON_CPU", Limits(64, 64))  # slices, many stacks
    _, allocator = with_gradients(many(count, width=50, out=40, dtype=dtype))
    factors = [factor for m in allocator.modules for factor in m.factors]
    for factor in factors:
        factor.parameter.data.normal_()
    for factor, (gram,) in zip(factors, gram_matrices(factors), strict=True):
        exact = factor.parameter.detach().double()
        exact = exact.T if factor.dim else exact
        torch.testing.assert_close(gram.double(), exact @ exact.T, rtol=1e-5, atol=1e-5)
        assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("importance", ["sensitivity", "share", "norm"])
def test_modules_that_fit_in_one_stack_cost_as_many_operations_as_one(importance):
    counts = [
        len(
            one_step(
                with_gradients(many(modules), importance=importance)[1], Watch(), has_dem=True
            ).names
        )
        for modules in (2, 20, 80)
    ]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] < 35


def test_reading_scaled_gradients_leaves_them_as_they_are():
    _, allocator = with_gradients(many(2), ema_beta=0)
    probes = [m.probes[0].parameter for m in allocator.modules]
    present = [p.grad.clone() for p in probes]
    allocator.score.before_step(allocator.modules, 4.0)
    allocator.score(allocator.modules, 1)
    for module, probe, gradient in zip(allocator.modules, probes, present, strict=True):
        torch.testing.assert_close(probe.grad, gradient, rtol=0, atol=0)
        torch.testing.assert_close(module.ema, (probe.detach() * gradient / 4).sum(0).abs())


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"preset": "paper"}, 55),
        ({"importance": "share"}, 40),
        ({"importance": "norm"}, 40),
        ({}, 25),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerator_launches_few_kernels_for_all_of_roberta(settings, bound, dtype):
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    with torch.device("meta"):  # no data: whatever waits for the device raises
        net = nn.Sequential(*(nn.Linear(i, o) for i, o in shapes * 12))
        names = [str(i) for i in range(len(net))]
        model = get_peft_model(net, LoraConfig(target_modules=names, r=12)).to(dtype)
    optimizer, allocator = with_gradients(model, **{"target_r": 8, **settings})
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert 0 < len(watch.names) < bound


@pytest.mark.parametrize("importance", ["sensitivity", "share"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_temporary_exceeds_a_megabyte(dtype, importance):
    model = many(12, width=4096, out=3000, dtype=dtype, rank=24)
    _, allocator = with_gradients(model, importance=importance)
    size = sum(f.parameter.numel() * 4 for m in allocator.modules for f in m.factors)
    watch = one_step(allocator, Watch(tensors_of(allocator)), has_dem=True)
    assert 0 < watch.largest <= ON_CPU.stack < size / 8


@pytest.mark.parametrize("importance", ["sensitivity", "share"])
def test_all_temporaries_together_stay_below_a_megabyte(importance):
    _, allocator = with_gradients(many(48, width=768, out=768, rank=12), importance=importance)
    one_step(allocator, Watch(), has_dem=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step(allocator, Watch(), has_dem=True)
    changes = [
        event.nbytes() for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]  # fmt: skip
    assert 0 < max(itertools.accumulate(changes)) < 1.2e6


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """There the allocator leaves out the looks that are free on a CPU."""
    for module in ("allocator", "checks"):
        monkeypatch.setattr(f"dynlora.allocator.{module}.reading_is_free", lambda _modules: False)


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("gated", [False, True])
def test_a_step_outside_prune_events_never_waits_for_the_device(gated):
    optimizer, allocator = with_gradients(many(4, gated=gated))
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert allocator.step == 1
    assert watch.names
    assert not WAITING & set(watch.names)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_between_two_prunings_the_dead_are_held_at_zero_without_asking_which():
    optimizer, allocator = with_gradients(many(4), revival=False)
    optimizer.step()
    allocator.start, allocator.stop = 0, 900
    allocator.modules[1].live[2:] = False
    allocator._masks = type(allocator._masks)(allocator.modules)
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert not WAITING & set(watch.names)
    assert not allocator.modules[1].probes[0].parameter[:, 2:].any()


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_step_after_compaction_only_watches_for_bad_gradients():
    optimizer, allocator = with_gradients(many(4))
    for _ in range(3):
        optimizer.step()
    allocator.freeze_()
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert len(watch.names) < 10
    assert not WAITING & set(watch.names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_modules_are_scored_pruned_and_compacted():
    model = many(10_000, width=4, out=4, rank=2)
    optimizer = adamw(model)
    allocator = RankAllocator(
        model, optimizer, total_steps=4, target_r=1, prune_start=0.5, prune_end=0.75
    )
    for _ in range(4):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert sum(allocator.ranks().values()) == 10_000
    assert len(allocator.finalize_()) == 10_000


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
