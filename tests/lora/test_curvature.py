"""The basis of curvature: the function stays, both metrics become diagonal, a cut costs little loss."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynlora.lora.components import find_components
from dynlora.lora.curvature import Curvature, middle_gradient
from dynlora.lora.triplets import to_singular_, triplets
from small_net import adamw, adapted, data, train
from tiny_models import EVERY_LAYER, logits, random_lora

WIDTHS = (6, 16, 16, 4)


def trained(steps=40):
    model = adapted(widths=WIDTHS, r=8)
    optimizer = adamw(model)
    train(model, optimizer, steps)
    return model, optimizer


def loss_of(model, rows=slice(None)):
    x, y = data()
    return ((model(0.9 * x[rows]) - y[rows]) ** 2).mean()


def curvature_of(model, batches=8):
    found = Curvature(find_components(model, "default"))
    for i in range(batches):
        model.zero_grad()
        loss_of(model, slice(i, None, batches)).backward()
        found.add()
    return found


def test_the_function_stays_and_each_module_falls_in_worth():
    model, optimizer = trained()
    before = loss_of(model).item()
    found = curvature_of(model)
    scores = found.turn_(optimizer)
    assert loss_of(model).item() == pytest.approx(before, rel=1e-5)
    for worth in scores.split([m.rank for m in found.modules]):
        assert bool((worth.diff() <= 0).all())
        assert bool((worth >= 0).all())


def test_the_basis_makes_both_matrices_diagonal_and_the_worth_is_the_singular_values_of_their_roots():
    torch.manual_seed(0)
    cs = torch.randn(20, 6, 6, dtype=torch.float64) * torch.logspace(0, -2, 6, dtype=torch.float64)
    left, right = (cs @ cs.mT).sum(0), (cs.mT @ cs).sum(0)
    for_a, for_b, worth = (found[0] for found in triplets(left[None], right[None]))
    assert torch.allclose(for_a.mT @ for_b, torch.eye(6, dtype=torch.float64))
    expected = torch.linalg.svdvals(root(left) @ root(right)).square()
    assert torch.allclose(worth, expected, rtol=1e-2)
    turned_left, turned_right = for_b @ left @ for_b.mT, for_a @ right @ for_a.mT
    assert torch.allclose(turned_left.diag() * turned_right.diag(), worth, rtol=1e-2)
    for matrix in (turned_left, turned_right):
        size = matrix.diag().sqrt()
        assert (matrix / size / size[:, None] - torch.eye(6)).abs().max() < 1e-2


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_the_middle_gradient_is_that_of_a_matrix_between_a_and_b():
    model, _ = trained()
    module = find_components(model, "default")[0]
    (a, b), layer = module.pairs[0], module.layer
    model.zero_grad()
    loss_of(model).backward()
    found = middle_gradient(b)[0]
    middle = torch.eye(8, requires_grad=True)
    held = layer.lora_B["default"].forward
    layer.lora_B["default"].forward = lambda z: held(z @ middle.T)
    model.zero_grad()
    loss_of(model).backward()
    assert torch.allclose(found.float(), middle.grad, atol=1e-6, rtol=1e-4)
    # the same from A alone
    assert torch.allclose(middle_gradient(a)[0].float(), middle.grad, atol=1e-5, rtol=1e-3)


def test_a_cut_by_curvature_costs_less_than_the_cut_of_the_same_components_by_energy():
    """What it is for: at a quarter of the components, on the rows it was measured on."""
    losses = {}
    for name in ("energy", "curvature"):
        model, _ = trained(80)
        found = curvature_of(model)
        energies = [] if name == "curvature" else [to_singular_(m) for m in found.modules]
        scores = torch.cat(energies) if energies else found.turn_()
        keep = torch.zeros(len(scores), dtype=torch.bool)
        keep[scores.argsort(descending=True)[: len(scores) // 4]] = True
        with torch.no_grad():
            for module, live in zip(
                found.modules, keep.split([m.rank for m in found.modules]), strict=True
            ):
                for factor in module.switches:
                    factor.parameter.mul_(live.to(factor.parameter.dtype))
        losses[name] = loss_of(model).item()
    assert losses["curvature"] < losses["energy"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize(("build", "fields"), EVERY_LAYER)
def test_every_kind_of_layer_is_turned_and_computes_the_same(build, fields):
    torch.manual_seed(0)
    model = random_lora(build, fields)
    modules = find_components(model, "default")
    found = Curvature(modules)
    for _ in range(4):
        model.zero_grad()
        for module in modules:
            for factor in module.factors:
                factor.parameter.grad = torch.randn(factor.parameter.shape)
        found.add()
    expected = logits(model)
    scores = found.turn_()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)
    assert len(scores) == 3 * len(modules)
    assert bool((scores > 0).all())
    for module in modules:
        to_singular_(module)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)


def test_the_metrics_of_the_factors_themselves_give_the_singular_triplets():
    model, optimizer = trained()
    for module in find_components(model, "default"):
        (a, b), scaling = module.pairs[0], module.scaling
        product = scaling * b.parameter.detach().double() @ a.parameter.detach().double()
        count = min(8, *product.shape)
        squares = to_singular_(module, optimizer)
        assert torch.allclose(
            squares[:count], torch.linalg.svdvals(product)[:count].square(), rtol=1e-4, atol=1e-8
        )
        rows, columns = a.parameter.detach().double(), b.parameter.detach().double().T
        assert torch.allclose(scaling * columns.T @ rows, product, atol=1e-6)
        for vectors in (rows[:count], columns[:count]):
            gram = vectors @ vectors.T
            size = gram.diag().sqrt()
            assert (gram / size / size[:, None] - torch.eye(count)).abs().max() < 1e-2


def test_without_gradients_nothing_is_worth_anything_and_the_function_stays():
    zeros = torch.zeros(1, 4, 4, dtype=torch.float64)
    for_a, for_b, values = triplets(zeros, zeros)
    assert values.tolist() == [[0.0] * 4]
    assert torch.allclose(for_a.mT @ for_b, torch.eye(4, dtype=torch.float64).expand(1, 4, 4))


def test_a_batch_with_a_gradient_that_is_not_finite_is_left_out():
    model, _ = trained(2)
    found = curvature_of(model)
    sums = [pair.clone() for pair in found.sums]
    next(p for n, p in model.named_parameters() if "lora_B" in n).grad.fill_(float("inf"))
    found.add()
    assert found.batches == 8
    assert all(torch.equal(a, b) for a, b in zip(found.sums, sums, strict=True))


def test_a_convolution_that_lies_channels_last_is_turned_too():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3))
    model = get_peft_model(net, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    (module,) = find_components(model, "default")
    to_singular_(module)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e15])
def test_the_order_does_not_depend_on_the_scale_of_the_loss(size):
    model, _ = trained()
    scores = []
    for scale in (1.0, size):
        found = Curvature(find_components(model, "default"))
        for rows in (slice(0, 4), slice(4, None)):
            model.zero_grad()
            (scale * loss_of(model, rows)).backward()
            found.add()
        values = {n: p.detach().clone() for n, p in model.named_parameters()}
        scores.append(found.turn_())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-6)


def test_state_that_is_a_point_like_the_weights_turns_with_them_and_unknown_state_is_begun_anew():
    model, optimizer = trained()
    module = find_components(model, "default")[0]
    known, unknown = (f.parameter for f in module.factors)
    optimizer.state[known]["z"] = known.detach().clone()  # of a schedule-free optimizer
    optimizer.state[unknown]["acc_delta"] = unknown.detach().clone()
    to_singular_(module, optimizer)
    torch.testing.assert_close(optimizer.state[known]["z"], known.detach())
    assert unknown not in optimizer.state
