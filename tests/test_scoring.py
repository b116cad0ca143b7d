"""Scoring and DEM cost little: few operations, small temporaries, no waiting for the device."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from dynlora import DynLoraConfig, RankAllocator
from dynlora.scoring import ON_CPU, Limits, add_dem_gradients_, gram_matrices
from small_net import adamw

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


def many(modules, *, width=8, out=8, dtype=torch.float32, **fields):
    net = nn.Sequential(*(nn.Linear(width, out, dtype=dtype) for _ in range(modules)))
    names = [str(i) for i in range(modules)]
    return get_peft_model(net, DynLoraConfig(target_modules=names, **fields))


def with_gradients(model):
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, total_steps=1000)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return optimizer, allocator


def one_step(allocator, watch):
    """What the allocator does around one optimizer step."""
    with watch:
        add_dem_gradients_(allocator.layers, factor=0.1)
        allocator.score(allocator.layers, 1)
    return watch


def tensors_of(allocator):
    for m in allocator.layers:
        for p in m.parameters:
            yield p
            yield p.grad
        yield m.ema


@pytest.mark.parametrize("rank_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_grams_are_the_inner_products(monkeypatch, rank_dim, dtype, count):
    monkeypatch.setattr("dynlora.scoring.ON_CPU", Limits(64, 64))  # slices, and many small stacks
    shape = (3, 50) if rank_dim == 0 else (50, 3)
    weights = [torch.randn(shape).to(dtype) for _ in range(count)] + [torch.ones(2, 2).to(dtype)]
    grams = gram_matrices([(weight, rank_dim) for weight in weights])
    for weight, gram in zip(weights, grams, strict=True):
        exact = weight.double() if rank_dim == 0 else weight.double().T
        torch.testing.assert_close(gram.double(), exact @ exact.T, rtol=1e-5, atol=1e-5)
        assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_scores_of_modules_of_many_shapes_and_ranks_equal_the_reference():
    net = nn.Sequential(*(nn.Linear(i, o) for i, o in [(4, 6), (6, 4), (4, 6), (6, 6), (6, 4)]))
    names = [str(i) for i in range(5)]
    model = get_peft_model(
        net,
        DynLoraConfig(
            target_modules=names,
            init_r=3,
            target_r=2,
            rank_pattern={"3": 5},
            ema_beta=0.75,
            importance="share",
        ),
    )
    _, allocator = with_gradients(model)
    for m in allocator.layers:
        m.gate.data = torch.randn_like(m.gate)
    allocator.score(allocator.layers, 1)
    for m in allocator.layers:
        a, b, c = (p.detach() for p in m.parameters)
        base = m.layer.get_base_layer()
        module = reference.Module(base.weight.data, base.bias.data, a, b, c, m.scaling)
        reference.smooth(module, reference.importance(module), 0.75)
        torch.testing.assert_close(m.ema, torch.tensor(module.ema), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_modules_that_fit_in_one_stack_cost_as_many_operations_as_one():
    counts = [
        len(one_step(with_gradients(many(modules))[1], Watch()).names) for modules in (2, 20, 80)
    ]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0] < 30


def test_taking_scaled_gradients_before_the_step_leaves_them_as_they_are(monkeypatch):
    monkeypatch.setattr("dynlora.scoring.needs_full_gradient", lambda _parameter: True)
    _, allocator = with_gradients(many(2, importance="sensitivity", ema_beta=0))
    present = [m.gate.grad.clone() for m in allocator.layers]
    allocator.score.before_step(allocator.layers, 4.0)
    allocator.score(allocator.layers, 1)
    for gated, gradient in zip(allocator.layers, present, strict=True):
        torch.testing.assert_close(gated.gate.grad, gradient, rtol=0, atol=0)
        torch.testing.assert_close(gated.ema, (gated.gate.detach() * gradient / 4).abs())


def test_a_and_b_of_one_length_share_a_stack():
    a, b = torch.randn(2, 3, 7).unbind(0)
    grams = gram_matrices([(a, 0), (b.T.contiguous(), 1)])
    torch.testing.assert_close(grams, [a @ a.T, b @ b.T])


@pytest.mark.parametrize(
    ("fields", "bound"),
    [({"preset": "paper"}, 35), ({"importance": "share"}, 20), ({}, 10)],
)
def test_an_accelerator_launches_few_kernels_for_all_of_roberta(fields, bound):
    shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    with torch.device("meta"):  # no data: whatever waits for the device raises
        net = nn.Sequential(*(nn.Linear(i, o) for i, o in shapes * 12))
        names = [str(i) for i in range(len(net))]
        model = get_peft_model(
            net, DynLoraConfig(target_modules=names, init_r=12, target_r=8, **fields)
        )
    optimizer, allocator = with_gradients(model)
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert 0 < len(watch.names) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_temporary_exceeds_a_megabyte(dtype):
    model = many(12, width=4096, out=3000, dtype=dtype, init_r=24, target_r=16)
    _, allocator = with_gradients(model)
    size = sum(p.numel() * 4 for m in allocator.layers for p in m.parameters)
    watch = one_step(allocator, Watch(tensors_of(allocator)))
    assert 0 < watch.largest <= ON_CPU.stack < size / 8


def test_all_temporaries_together_stay_below_a_megabyte():
    shapes = {"width": 768, "out": 768, "init_r": 12, "target_r": 8, "preset": "paper"}
    _, allocator = with_gradients(many(48, **shapes))
    one_step(allocator, Watch())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step(allocator, Watch())
    changes = [
        event.nbytes() for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]  # fmt: skip
    assert 0 < max(itertools.accumulate(changes)) < 1e6


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """There the allocator leaves out the looks that are free on a CPU."""
    for module in ("allocator", "scoring"):
        monkeypatch.setattr(f"dynlora.{module}.can_look", lambda _layers: False)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_step_outside_prune_events_never_waits_for_the_device():
    model = many(4)
    optimizer, allocator = with_gradients(model)
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert allocator.step == 1
    assert watch.names
    assert not WAITING & set(watch.names)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_step_after_compaction_does_nothing_at_all():
    model = many(4)
    optimizer, allocator = with_gradients(model)
    optimizer.step()
    allocator.freeze_()
    with Watch() as watch:
        allocator._before_step(optimizer, (), {})
        allocator._after_step(optimizer, (), {})
    assert watch.names == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_modules_are_scored_pruned_and_compacted():
    model = many(10_000, width=4, out=4, init_r=2, target_r=1)
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, total_steps=4)
    for _ in range(4):
        for name, parameter in model.named_parameters():
            if name.endswith(".c"):
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert sum(allocator.ranks().values()) == 10_000
    assert len(allocator.finalize_()) == 10_000
