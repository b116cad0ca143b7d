"""Cuts by singular values: the basis, the optimizer's state in it, and the schedules."""

import pytest
import torch

from dynlora import DynLoraCallback
from dynlora.lora.components import find_components
from dynlora_lab.methods import METHODS, AdapterOptions, Target
from dynlora_lab.methods.singular import squared_norms, to_singular_triplets_
from dynlora_lab.methods.squeeze import squeezed
from small_net import adamw, adapted, attached, data, train
from tiny_methods import HEAD, tiny


def loss_of(model):
    x, y = (t.double() for t in data())
    return ((model(x) - y) ** 2).mean()


def trained(steps=5):
    model = adapted(dtype=torch.float64)
    optimizer = adamw(model)
    train(model, optimizer, steps, dtype=torch.float64)
    return model, optimizer, find_components(model, "default")


def test_components_become_singular_triplets_and_the_function_stays():
    model, optimizer, modules = trained()
    expected = model(data()[0].double())
    for module in modules:
        update = module.layer.get_delta_weight("default").detach()
        before = module.layer.lora_A["default"].weight.detach().norm()
        to_singular_triplets_(module, optimizer)
        a = module.factors[0].parameter.detach()
        assert torch.allclose(a @ a.T, torch.eye(4).double() * before**2 / 4)
        values = torch.linalg.svdvals(update)[:4]
        assert torch.allclose(squared_norms(module).sqrt(), values)
    torch.testing.assert_close(model(data()[0].double()), expected)


def test_moments_are_those_of_the_gradients_in_the_new_basis():
    model, optimizer, modules = trained()
    optimizer.zero_grad()
    loss_of(model).backward()
    for module in modules:
        for factor in module.factors:
            optimizer.state[factor.parameter]["exp_avg"].copy_(factor.parameter.grad)
        to_singular_triplets_(module, optimizer)
    turned = {f.parameter: f.parameter.grad.clone() for m in modules for f in m.factors}
    optimizer.zero_grad()
    loss_of(model).backward()
    for parameter, gradient in turned.items():
        torch.testing.assert_close(gradient, parameter.grad)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], parameter.grad)


def test_second_moments_are_turned_as_if_gradients_of_components_did_not_correlate():
    _, optimizer, modules = trained()
    module = modules[0]
    b = module.factors[1].parameter
    optimizer.state[b]["exp_avg_sq"].fill_(2.0)
    before = module.factors[0].parameter.detach().clone()
    to_singular_triplets_(module, optimizer)
    turn = module.factors[0].parameter.detach() @ torch.linalg.pinv(before)
    expected = 2.0 * turn.square().sum(1).expand(7, 4)
    torch.testing.assert_close(optimizer.state[b]["exp_avg_sq"], expected)


def test_pruned_components_stay_where_they_are():
    model, optimizer, modules = trained()
    for module in modules:
        module.live[1] = False
        module.factors[1].parameter.data[:, 1] = 0
    expected = model(data()[0].double())
    rows = [m.factors[0].parameter[1].detach().clone() for m in modules]
    for module, row in zip(modules, rows, strict=True):
        to_singular_triplets_(module, optimizer)
        assert torch.equal(module.factors[0].parameter[1], row)
        assert not module.factors[1].parameter[:, 1].any()
    torch.testing.assert_close(model(data()[0].double()), expected)


def test_a_layer_narrower_than_its_rank_keeps_zeros_in_the_last_components():
    model = adapted(dtype=torch.float64, widths=(6, 2, 4, 4))
    train(model, adamw(model), 5, dtype=torch.float64)
    expected = model(data()[0].double())
    for module in find_components(model, "default"):
        to_singular_triplets_(module)
    torch.testing.assert_close(model(data()[0].double()), expected)
    narrow = find_components(model, "default")[0]
    assert torch.equal(squared_norms(narrow) > 1e-12, torch.tensor([True, True, False, False]))


def squeezed_run(*, is_uniform, **settings):
    callback = squeezed(DynLoraCallback(target_r=2), is_uniform=is_uniform)
    fields = {"target_r": 2, **settings}
    model, optimizer, allocator = attached(total_steps=20, score=callback.score, **fields)
    callback.allocator = allocator
    train(model, optimizer, 20)
    return allocator


def test_one_cut_leaves_every_module_the_same_rank():
    allocator = squeezed_run(is_uniform=True, prune_interval=1000)
    assert list(allocator.ranks().values()) == [2, 2, 2]
    assert [event["step"] for event in allocator.history] == [10]


def test_a_cut_is_the_best_approximation_of_each_update():
    callback = squeezed(DynLoraCallback(target_r=2), is_uniform=True)
    settings = {"prune_interval": 1000, "prune_end": 1.0, "compact": False}
    model, optimizer, callback.allocator = attached(
        total_steps=5, score=callback.score, dtype=torch.float64, **settings
    )
    before = {}

    @torch.no_grad()
    def remember(modules, step):
        for module in modules:
            before[module.name] = module.layer.get_delta_weight("default").clone()
        inner(modules, step)

    inner = callback.allocator.score.score
    callback.allocator.score.score = remember
    train(model, optimizer, 5, dtype=torch.float64)
    for module in callback.allocator.modules:
        update = before[module.name]
        left = module.layer.get_delta_weight("default").detach()
        error = torch.linalg.matrix_norm(update - left)
        rest = torch.linalg.svdvals(update)[2:].norm()
        assert float(error) == pytest.approx(float(rest), rel=1e-6)
        assert float(rest) > 1e-6


def test_in_steps_the_rank_falls_alike_in_every_module():
    allocator = squeezed_run(is_uniform=True, prune_interval=2, prune_end=0.9)
    ranks = [list(event["ranks"].values()) for event in allocator.history]
    assert len(ranks) > 3
    assert all(max(r) - min(r) <= 1 for r in ranks)
    assert ranks[-1] == [2, 2, 2]
    assert ranks[0] != ranks[-1]


def test_by_energy_the_largest_singular_values_of_the_model_stay():
    callback = squeezed(DynLoraCallback(target_r=2), is_uniform=False)
    seen = {}

    def score(modules, step):
        callback.score(modules, step)
        if step == 10:
            seen.update({m.name: m.layer.get_delta_weight("default").detach() for m in modules})

    settings = {"prune_interval": 1000, "budget": "components", "widths": (6, 16, 5, 4)}
    model, optimizer, callback.allocator = attached(total_steps=20, score=score, **settings)
    train(model, optimizer, 20)
    values = {name: torch.linalg.svdvals(update)[:4] for name, update in seen.items()}
    least = torch.cat(list(values.values())).sort(descending=True).values[2 * 3 - 1]
    expected = {name: int((v >= least * 0.9999).sum()) for name, v in values.items()}
    assert callback.allocator.ranks() == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize(
    ("method", "events"), [("cont-squeeze", 1), ("in-squeeze", 4), ("dynlora-rotated", 4)]
)
def test_the_schedules_of_the_methods_differ_in_their_cuts_alone(method, events):
    options = AdapterOptions(target_r=2, init_r=8, prune_interval=10)
    target = Target(model=tiny(), head=HEAD, task_type="SEQ_CLS", seed=0)
    made = METHODS[method](options, target)
    schedule = made.schedule(100)
    assert len(schedule) == 1 + events
    assert schedule[-1] == (50, adapted_parameters() * 2)
    assert made.callbacks[0].score is not None


def adapted_parameters():
    """Of a LoRA of rank 1."""
    target = Target(model=tiny(), head=HEAD, task_type="SEQ_CLS", seed=0)
    return METHODS["lora"](AdapterOptions(target_r=1), target).parameters()
