"""⟨b, ∂L/∂b⟩ of a stock LoRA is the c·∂L/∂c of a real gate, on every kind of layer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.allocator.scores import norms, sensitivities
from dynlora.lora.components import find_components
from tiny_models import EXPERTS, KINDS, batch, layer_kinds, tiny_experts


def drawn(base, **fields):
    """An adapter in float64 whose A and B are both away from 0."""
    model = get_peft_model(base.double(), LoraConfig(r=3, lora_alpha=6, **fields))
    draws = torch.Generator().manual_seed(3)
    for module in find_components(model, "default"):
        for factor in module.factors:
            parameter = factor.parameter
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws).double()
    return model


def loss_of(model):
    output = model(**batch(model.get_base_model()))
    return output.square().mean() if torch.is_tensor(output) else output.loss


def gate_products(model, module):
    """cᵢ · ∂L/∂cᵢ at c = 1, where c multiplies component i in every pair of the module."""
    gate = torch.ones(module.rank, dtype=torch.float64, requires_grad=True)
    weights = {b: b.parameter for _, b in module.pairs}
    for factor, weight in weights.items():
        shape = [1] * weight.ndim
        shape[factor.dim] = -1
        put(factor, weight.detach() * factor.by_component(gate).view(shape))
    (gradient,) = torch.autograd.grad(loss_of(model), gate)
    for factor, weight in weights.items():
        put(factor, weight)
    return gradient


def put(factor, value):
    """Let a parameter be another tensor, which may have a graph."""
    holder = getattr(factor.layer, factor.container)
    if factor.attribute:
        holder, name = holder[factor.adapter], factor.attribute
    else:
        name = factor.adapter
    holder._parameters.pop(name, None)
    holder.__dict__.pop(name, None)
    if isinstance(value, nn.Parameter):
        holder._parameters[name] = value
    else:
        holder.__dict__[name] = value


CASES = {kind: (layer_kinds, {"target_modules": [kind]}) for kind in KINDS}
CASES["experts"] = (tiny_experts, {"target_parameters": EXPERTS})


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_sensitivity_is_the_gates(name):
    build, fields = CASES[name]
    model = drawn(build(), **fields)
    modules = find_components(model, "default")
    loss_of(model).backward()
    found = sensitivities(modules)
    assert modules
    for module, scores in zip(modules, found, strict=True):
        expected = gate_products(model, module).abs()
        assert expected.max() > 0
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_so_it_is_on_the_side_of_a(kind):
    model = drawn(layer_kinds(), target_modules=[kind])
    (module,) = find_components(model, "default")
    loss_of(model).backward()
    (a, _), (scores,) = module.pairs[0], sensitivities([module])
    product = a.vectors(a.parameter.detach() * a.parameter.grad)[0].sum(1).abs()
    torch.testing.assert_close(scores, product, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("name", [*KINDS, "experts"])
def test_share_and_norm_are_those_of_the_dense_updates(name):
    build, fields = CASES[name]
    model = drawn(build(), **fields)
    modules = find_components(model, "default")
    for kind in ("share", "norm"):
        for module, scores in zip(modules, norms(modules, kind), strict=True):
            dense = [update_of(module, [i]) for i in range(module.rank)]
            whole = update_of(module, range(module.rank)).norm() + 1e-8
            expected = torch.stack([d.norm() for d in dense])
            expected = expected / whole if kind == "share" else expected * module.scaling
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)


def update_of(module, components):
    """Σᵢ bᵢ aᵢᵀ over all pairs and copies of a module, as one long vector."""
    parts = []
    for a, b in module.pairs:
        rows, columns = a.vectors(a.parameter.detach()), b.vectors(b.parameter.detach())
        for row, column in zip(rows, columns, strict=True):
            parts.append(sum(torch.outer(column[i], row[i]) for i in components).flatten())
    return torch.cat(parts)
