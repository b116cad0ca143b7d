"""Where a layer is not what the fused path computes, PEFT's own forward pass does."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad

from dynlora.fused import fuse_
from fused_nets import EXACT, adapted, assert_same, first, num_fused, pair
from small_net import data, small_net


def hook(*path):
    def watch(model):
        return first(model).get_submodule(".".join(path)).register_forward_hook(lambda *_: None)

    return watch


def replaced_forward(model):
    base = first(model).base_layer
    base.forward = type(base).forward.__get__(base)


def other_dropout(model):
    first(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


def scaling_as_tensor(model):
    """What ``prepare_model_for_compiled_hotswap`` does."""
    first(model).scaling["default"] = torch.tensor(first(model).scaling["default"])


def parametrised(model):
    nn.utils.parametrizations.weight_norm(first(model).base_layer)


UNCOMMON = {
    "hook on A": hook("lora_A", "default"),
    "hook on B": hook("lora_B", "default"),
    "hook on the base": hook("base_layer"),
    "hook on dropout": hook("lora_dropout", "default"),
    "base with its own forward": replaced_forward,
    "trained base weight": lambda model: first(model).base_layer.weight.requires_grad_(),
    "trained base bias": lambda model: first(model).base_layer.bias.requires_grad_(),
    "another dropout": other_dropout,
    "scaling as a tensor": scaling_as_tensor,
    "parametrised base": parametrised,
}


@pytest.mark.parametrize("change", UNCOMMON.values(), ids=UNCOMMON)
def test_a_layer_that_is_not_common_computes_as_peft_does(change):
    fused, plain = pair()
    change(fused)
    change(plain)
    assert_same(fused, plain, data()[0], count=1)


@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_a_lora_that_is_not_common_computes_as_peft_does(fields):
    fused, plain = adapted(**fields), adapted(**fields)
    fuse_(fused)
    assert_same(fused, plain, data()[0], count=0)


@contextlib.contextmanager
def global_hook(_model):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def merged(model):
    model.merge_adapter()
    yield


@contextlib.contextmanager
def two_adapters(model):
    torch.manual_seed(9)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    yield


@contextlib.contextmanager
def doubled(model):
    model.double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    yield


STATES = {
    "a hook on all modules": global_hook,
    "merged": merged,
    "two active adapters": two_adapters,
    "disabled": lambda model: model.disable_adapter(),
    "two dtypes": doubled,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_model_that_is_not_common_computes_as_peft_does(state):
    fused, plain = pair()
    with state(fused), state(plain):
        x = data()[0].to(next(fused.parameters()).dtype)
        actual, expected = fused(x), plain(x)
        assert num_fused(actual) == 0
        torch.testing.assert_close(actual, expected, **EXACT)


def test_a_base_in_bfloat16_under_an_adapter_in_float32_computes_as_peft_does():
    outputs = []
    for is_fused in (True, False):
        model = get_peft_model(small_net().bfloat16(), LoraConfig(target_modules=["0", "1"]))
        assert not is_fused or fuse_(model) == 2
        outputs.append(model(data()[0].bfloat16()))
    assert num_fused(outputs[0]) == 0
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_mixed_batch_computes_as_peft_does():
    fused, plain = (model.eval() for model in pair())
    names = ["default", "__base__"] * 16
    actual = fused(data()[0], adapter_names=names)
    assert num_fused(actual) == 0
    torch.testing.assert_close(actual, plain(data()[0], adapter_names=names), **EXACT)


def test_function_transforms_compute_as_peft_does():
    fused, plain = pair()
    x = data()[0]
    for transform in (torch.func.grad, torch.func.jacrev):
        actual, expected = (
            transform(lambda v, model=model: model(v).sum())(x) for model in (fused, plain)
        )
        torch.testing.assert_close(actual, expected, **EXACT)
    actual, expected = (torch.func.vmap(model)(x) for model in (fused, plain))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # by torch's own rules
def test_forward_mode_derivatives_are_pefts():
    x = data()[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        actual, expected = (forward_ad.unpack_dual(model(dual)).tangent for model in pair())
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_traced_layer_is_pefts():
    fused, plain = (first(model).eval().requires_grad_(False) for model in pair())
    x = data()[0]
    traced = torch.jit.trace(fused, x)
    assert "LoraLinear" not in str(traced.graph)
    torch.testing.assert_close(traced(x + 1), plain(x + 1), **EXACT)


def test_an_exported_layer_computes_the_same():
    layer = first(pair()[0]).eval().requires_grad_(False)
    x = data()[0]
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x + 1), layer(x + 1), **EXACT)


def test_a_nested_tensor_is_left_to_peft():
    fused, plain = (model.eval() for model in pair())
    x = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)], layout=torch.jagged)
    torch.testing.assert_close(first(fused)(x).values(), first(plain)(x).values(), **EXACT)
