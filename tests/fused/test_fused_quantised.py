"""LoRA layers over bitsandbytes' layers: the base's own product with a fused update equals PEFT's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynlora.fused import fuse_, unfuse_
from dynlora.fused.linear import LoraUpdate

bnb = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' own

EXACT = {"rtol": 1e-6, "atol": 1e-6}
BITS = [4, 8]


def quantised(bits, dtype=torch.float32):
    """Three layers of 64; the last stays without an adapter."""

    def linear():
        if bits == 4:
            return bnb.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
        return bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)

    torch.manual_seed(0)
    net = nn.Sequential(linear(), nn.Tanh(), linear(), nn.Tanh(), linear())
    net = net.to(dtype).to("cpu").requires_grad_(False)
    vars(net).update(is_loaded_in_4bit=bits == 4, is_loaded_in_8bit=bits == 8)  # asked for by PEFT
    return net


def pair(bits, dtype=torch.float32, **fields):
    """The same adapted net, fused and as PEFT computes it; the second layer fell to rank 0."""
    models = []
    for is_fused in (True, False):
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_modules=["0", "2"], init_lora_weights=False, lora_alpha=6, **fields
        )
        model = get_peft_model(quantised(bits, dtype), config).train()
        model.get_base_model()[2].delete_adapter("default")
        assert not is_fused or fuse_(model) == 1
        models.append(model)
    return models


def inputs(dtype=torch.float32):
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def is_fused(output):
    queue, seen = [output.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return any(node.name() == "LoraUpdateBackward" for node in seen)


def run(model, x):
    """The output, the gradient of x and those of the parameters."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.float().square().mean().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_first_and_second_derivatives_are_right(masked, rank):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    mask = torch.rand(5, 4) > 0.3 if masked else None
    arguments = (draw(5, 6), draw(5, 4), draw(rank, 4), draw(6, rank), 0.7, mask)
    assert torch.autograd.gradcheck(LoraUpdate.apply, arguments)
    assert torch.autograd.gradgradcheck(LoraUpdate.apply, arguments)


@pytest.mark.parametrize("bits", BITS)
def test_outputs_and_gradients_equal_pefts(bits):
    fused, plain = (run(model, inputs()) for model in pair(bits))
    assert (is_fused(fused[0]), is_fused(plain[0])) == (True, False)
    torch.testing.assert_close(fused, plain, **EXACT)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_dtypes_are_pefts_where_base_and_adapter_differ(bits, x_dtype, is_autocast):
    runs = []
    for model in pair(bits, torch.bfloat16):  # PEFT keeps the adapter in float32
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            runs.append(run(model, inputs(x_dtype)))
    fused, plain = runs
    assert is_fused(fused[0])
    assert [t.dtype for t in fused] == [t.dtype for t in plain]
    torch.testing.assert_close(fused, plain, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout_gives_the_same_gradients(bits, use_reentrant):
    model, _ = pair(bits, lora_dropout=0.3)
    torch.manual_seed(7)
    expected = run(model, inputs())
    model.zero_grad()
    torch.manual_seed(7)
    x = inputs().requires_grad_()
    output = checkpoint(model, x, use_reentrant=use_reentrant)
    output.square().mean().backward()
    actual = [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_dropout_is_scaled_by_what_is_kept_and_off_in_evaluation(bits):
    fused, plain = pair(bits, lora_dropout=0.5)
    x = torch.ones(4000, 64)
    layers = [model.get_base_model()[0] for model in (fused, plain)]
    torch.testing.assert_close(*(layer(x).mean(0) for layer in layers), rtol=0.1, atol=0.1)
    torch.testing.assert_close(*(layer.eval()(inputs()) for layer in layers), **EXACT)


@pytest.mark.parametrize("bits", BITS)
def test_a_model_that_is_not_common_computes_as_peft_does(bits):
    fused, plain = pair(bits)
    for model in (fused, plain):
        model.get_base_model()[0].lora_A["default"].register_forward_hook(lambda *_: None)
    actual, expected = fused(inputs()), plain(inputs())
    assert not is_fused(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    with fused.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_fusing_and_unfusing_change_the_class_and_nothing_else(bits):
    fused, plain = pair(bits)
    assert fuse_(fused) == 1
    twin = copy.deepcopy(fused)
    assert is_fused(twin(inputs()))
    layer, stock = (model.get_base_model()[0] for model in (fused, plain))
    assert isinstance(layer, type(stock))
    assert type(layer) is not type(stock)
    unfuse_(fused)
    unfuse_(fused)
    assert type(layer) is type(stock)
    assert not is_fused(fused(inputs()))
