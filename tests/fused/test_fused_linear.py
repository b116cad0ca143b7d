"""Fused stock LoRA layers compute what PEFT's compute."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny_models
from dynlora.fused import fuse_
from dynlora.fused.linear import LoraLinear, keep_mask
from fused_nets import EXACT, adapted, assert_same, first, gradients, num_fused, pair
from small_net import data

# -- the function ----------------------------------------------------------------------------------


def random_arguments(*, masked, rank=3, tokens=5, width=4, out=6):
    def draw(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

    return (
        draw(tokens, width),
        draw(out, width, grad=False),
        draw(out, grad=False),
        draw(rank, width),
        draw(out, rank),
        0.7,
        torch.rand(tokens, width) > 0.3 if masked else None,
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives_are_right(masked, rank):
    arguments = random_arguments(masked=masked, rank=rank)
    assert torch.autograd.gradcheck(LoraLinear.apply, arguments)
    assert torch.autograd.gradgradcheck(LoraLinear.apply, arguments)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trained", [0, 3, 4])
def test_each_gradient_is_right_when_it_alone_is_asked_for(masked, trained):
    arguments = [
        v.detach() if isinstance(v, torch.Tensor) else v for v in random_arguments(masked=masked)
    ]
    arguments[trained].requires_grad_()
    assert torch.autograd.gradcheck(LoraLinear.apply, tuple(arguments))


# -- equal to PEFT's -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_equal_pefts(dtype, use_rslora):
    fused, plain = pair(dtype=dtype, use_rslora=use_rslora)
    assert_same(fused, plain, data()[0].to(dtype), count=2)


@pytest.mark.parametrize("build", [tiny_models.tiny_llama, tiny_models.tiny_bert])
def test_transformers_equal_pefts(build):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    outputs, grads = [], []
    for is_fused in (True, False):
        model = get_peft_model(build(), config).train()
        batch = tiny_models.batch(model.get_base_model())
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        assert not is_fused or fuse_(model) > 10
        torch.manual_seed(0)  # the base model's own dropout
        outputs.append(model(**batch).logits)
        grads.append(gradients(model, outputs[-1]))
    assert num_fused(outputs[0]) > 10
    torch.testing.assert_close(*outputs, **EXACT)
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6), (2, 0, 6)])
def test_inputs_of_any_number_of_dimensions_are_served(shape):
    fused, plain = pair()
    x = torch.randn(*shape)
    assert num_fused(fused(x)) == 2
    torch.testing.assert_close(fused(x), plain(x), **EXACT)


def test_a_transposed_input_is_served():
    assert_same(*pair(), torch.randn(6, 5, 2).transpose(0, 2), count=2)


def test_an_output_may_be_changed_in_place():
    grads = []
    for model in pair():
        x = data()[0].requires_grad_()
        output = first(model)(x)
        output.mul_(2).relu_()
        grads.append(gradients(model, output))
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_change_of_rank_is_followed(rank):
    fused, plain = pair()
    for model in (fused, plain):
        a, b = first(model).lora_A["default"], first(model).lora_B["default"]
        a.weight = nn.Parameter(a.weight.detach()[:rank].clone())
        b.weight = nn.Parameter(b.weight.detach()[:, :rank].clone())
    assert_same(fused, plain, data()[0], count=2)


def test_a_change_of_scaling_is_followed():
    fused, plain = pair()
    for model in (fused, plain):
        first(model).set_scale("default", 0.3)
    assert_same(fused, plain, data()[0], count=2)


def test_a_layer_whose_adapter_was_deleted_is_its_base_layer():
    fused, plain = pair()
    for model in (fused, plain):
        first(model).delete_adapter("default")
    assert_same(fused, plain, data()[0], count=1)
    x = data()[0]
    torch.testing.assert_close(first(fused)(x), first(fused).base_layer(x), rtol=0, atol=0)


def test_whole_runs_end_at_the_same_weights():
    ends = []
    for model in pair(dtype=torch.float64):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        x, y = (t.double() for t in data())
        for _ in range(30):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


# -- where it works --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_the_parameters(dtype):
    fused, plain = pair()
    x = data()[0]
    with torch.autocast("cpu", dtype):
        actual, expected = fused(x), plain(x)
    assert num_fused(actual) == 2
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    ours, theirs = gradients(fused, actual), gradients(plain, expected)
    assert {g.dtype for g in ours} == {torch.float32}
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_a_backward_pass_inside_autocast_keeps_the_dtype_of_the_forward_pass():
    fused, plain = pair()
    x = data()[0]
    actual, expected = first(fused)(x), gradients(plain, first(plain)(x))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(fused, actual)
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, lora_dropout, is_autocast):
    fused, _ = pair(lora_dropout=lora_dropout)
    x = data()[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        torch.manual_seed(7)
        expected = fused(x)
        torch.manual_seed(7)
        actual = checkpoint(fused, x, use_reentrant=use_reentrant)
    torch.testing.assert_close(gradients(fused, actual), gradients(fused, expected), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_pefts_to_the_bit_and_training_without_gradients_to_rounding(mode):
    fused, plain = pair()
    with mode():
        torch.testing.assert_close(fused(data()[0]), plain(data()[0]), **EXACT)
        actual, expected = fused.eval()(data()[0]), plain.eval()(data()[0])
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_meta_tensors_are_served():
    model = adapted().to("meta")
    fuse_(model)
    output = model(torch.empty(5, 6, device="meta"))
    assert num_fused(output) == 2
    assert output.shape == (5, 4)


def test_a_functional_call_computes_with_the_given_parameters():
    fused, plain = pair()
    names = {n: 2 * p for n, p in plain.named_parameters() if "lora_" in n}
    x = data()[0]
    actual, expected = (torch.func.functional_call(m, names, (x,)) for m in (fused, plain))
    assert num_fused(actual) == 2
    torch.testing.assert_close(actual, expected, **EXACT)


def kept_bytes(model, x):
    """Bytes that the graph of one forward keeps for its backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    assert output.requires_grad
    return sum(storages.values())


def test_it_keeps_no_more_for_the_backward_pass_and_less_with_dropout():
    x = torch.randn(64, 6, requires_grad=True)
    fused, plain = pair()
    assert kept_bytes(fused, x) <= kept_bytes(plain, x)
    fused, plain = pair(lora_dropout=0.1)
    assert kept_bytes(fused, x) < 0.75 * kept_bytes(plain, x)


# -- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 1e-9])
def test_a_mask_keeps_its_share_and_the_share_is_exact(p):
    mask, kept = keep_mask(torch.zeros(1000, 101), p)
    assert mask.shape == (1000, 101)
    assert kept == pytest.approx(1 - p, abs=2**-16)
    assert mask.float().mean().item() == pytest.approx(kept, abs=0.01)
    by_lane = mask.flatten()[: 1000 * 100].view(-1, 4).float().mean(0)  # four entries share a draw
    torch.testing.assert_close(by_lane, torch.full((4,), kept), rtol=0, atol=0.02)


def test_dropout_is_on_in_training_only_and_scaled_by_what_is_kept():
    model = adapted(lora_dropout=0.4)
    fuse_(model)
    layer = first(model)
    x = data()[0]
    base = layer.base_layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    torch.manual_seed(3)
    actual = layer.train()(x)
    torch.manual_seed(3)
    mask, kept = keep_mask(x, 0.4)
    expected = base + layer.scaling["default"] * b((x * mask / kept) @ a.T)
    assert num_fused(actual) == 1
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().mean(), (a, b.weight)) for y in (actual, expected)),
        **EXACT,
    )
    update = base + layer.scaling["default"] * b(x @ a.T)
    torch.testing.assert_close(layer.eval()(x), update, **EXACT)
