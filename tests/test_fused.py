"""The fused path computes what PEFT's path computes, where it applies, and steps aside elsewhere."""

import contextlib

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny_models
from dynlora import DynLoraConfig, RankAllocator
from dynlora.adapter.fused import GatedLinear, keep_mask
from small_net import adamw, adapted, data, train

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def open_gates_(model):
    """Gates off their start at 0, where A and B have no gradient; the same in every model."""
    draws = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(".c"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draws).to(parameter)
    return model


def pair(**fields):
    """The same adapted net, on the fused path and on PEFT's."""
    return tuple(open_gates_(adapted(fused=fused, **fields)).train() for fused in (True, False))


def num_fused(output):
    """Fused functions in the graph behind ``output``."""
    seen, queue, count = set(), [output.grad_fn], 0
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += node.name() == "GatedLinearBackward"
        queue += [parent for parent, _ in node.next_functions]
    return count


def gradients(model, output):
    model.zero_grad()
    output.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def random_arguments(*, masked, tokens=5, width=4, out=6, rank=3):
    def draw(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

    return (
        draw(tokens, width),
        draw(out, width, grad=False),
        draw(out, grad=False),
        draw(rank, width),
        draw(out, rank),
        draw(rank),
        0.7,
        torch.rand(tokens, width) > 0.3 if masked else None,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives_are_right(masked):
    arguments = random_arguments(masked=masked)
    assert torch.autograd.gradcheck(GatedLinear.apply, arguments)
    assert torch.autograd.gradgradcheck(GatedLinear.apply, arguments)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trained", [0, 3, 4, 5])
def test_each_gradient_is_right_when_it_alone_is_asked_for(masked, trained):
    arguments = [
        v.detach() if isinstance(v, torch.Tensor) else v for v in random_arguments(masked=masked)
    ]
    arguments[trained].requires_grad_()
    assert torch.autograd.gradcheck(GatedLinear.apply, tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_equal_pefts_path(dtype):
    fused, plain = pair(dtype=dtype)
    x = data()[0].to(dtype)
    actual, expected = fused(x), plain(x)
    assert num_fused(actual) == 3
    assert num_fused(expected) == 0
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(gradients(fused, actual), gradients(plain, expected), **EXACT)


@pytest.mark.parametrize("build", [tiny_models.tiny_llama, tiny_models.tiny_bert])
def test_transformers_equal_pefts_path(build):
    models = [
        open_gates_(tiny_models.adapted(build, fused=fused)).train() for fused in (True, False)
    ]
    batch = tiny_models.batch(models[0].get_base_model())
    outputs = []
    for model in models:
        torch.manual_seed(0)  # the base model's own dropout
        outputs.append(model(**batch).logits)
    actual, expected = outputs
    assert num_fused(actual) > 10
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(
        gradients(models[0], actual), gradients(models[1], expected), **EXACT
    )


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6), (2, 0, 6)])
def test_inputs_of_any_number_of_dimensions_are_served(shape):
    fused, plain = pair()
    x = torch.randn(*shape, requires_grad=True)
    torch.testing.assert_close(fused(x), plain(x), **EXACT)


def test_a_transposed_input_is_served():
    fused, plain = pair()
    x = torch.randn(6, 5, 2).transpose(0, 2)
    torch.testing.assert_close(fused(x), plain(x), **EXACT)


def test_whole_runs_on_both_paths_end_at_the_same_ranks():
    runs = []
    for fused in (True, False):
        model = adapted(fused=fused, dtype=torch.float64)
        optimizer = adamw(model)
        allocator = RankAllocator(model, optimizer, total_steps=40)
        losses = train(model, optimizer, 40, dtype=torch.float64)
        assert num_fused(model(data()[0].double())) == (fused and 3)
        runs.append((losses, allocator.ranks()))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=0)
    assert runs[0][1] == runs[1][1]


def test_after_finalize_the_layers_are_stock():
    model = adapted()
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, total_steps=10)
    train(model, optimizer, 10)
    allocator.finalize_()
    assert num_fused(model(data()[0])) == 0
    assert not any("is_fused" in vars(module) for module in model.modules())


# -- where it works --------------------------------------------------------------------------------


def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_the_parameters():
    fused, plain = pair()
    x = data()[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(x), plain(x)
    assert num_fused(actual) == 3
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    ours, theirs = gradients(fused, actual), gradients(plain, expected)
    assert {g.dtype for g in ours} == {torch.float32}
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, lora_dropout):
    model = open_gates_(adapted(lora_dropout=lora_dropout)).train()
    x = data()[0].requires_grad_()
    torch.manual_seed(7)
    expected = gradients(model, model(x))
    torch.manual_seed(7)
    actual = gradients(model, checkpoint(model, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiled_without_a_graph_break_it_gives_the_same_gradients():
    model = open_gates_(adapted()).train()
    x = data()[0]
    expected = gradients(model, model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled(x)), expected, **EXACT)


def test_inference_mode_gives_pefts_output():
    fused, plain = pair()
    with torch.inference_mode():
        torch.testing.assert_close(fused(data()[0]), plain(data()[0]), **EXACT)


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


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_it_keeps_less_for_the_backward_pass(lora_dropout):
    fused, plain = pair(lora_dropout=lora_dropout)
    x = torch.randn(64, 6, requires_grad=True)
    assert kept_bytes(fused, x) < 0.75 * kept_bytes(plain, x)


# -- dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 1e-9])
def test_a_mask_keeps_its_share_and_the_share_is_exact(p):
    mask, kept = keep_mask(torch.zeros(1000, 101), p)
    assert mask.shape == (1000, 101)
    assert kept == pytest.approx(1 - p, abs=2**-16)
    assert mask.float().mean().item() == pytest.approx(kept, abs=0.01)
    by_lane = mask.flatten()[: 1000 * 100].view(-1, 4).float().mean(0)  # four entries share a draw
    torch.testing.assert_close(by_lane, torch.full((4,), kept), rtol=0, atol=0.02)


def test_dropout_is_on_in_training_only_and_scaled_by_what_is_kept():
    model = open_gates_(adapted(lora_dropout=0.4, target_modules=["0"]))
    layer = model.get_base_model().layers[0]
    x = data()[0]
    base = layer.base_layer(x)
    a, c, b = layer.lora_A["default"].weight, layer.lora_A["default"].c, layer.lora_B["default"]
    torch.manual_seed(3)
    actual = layer.train()(x)
    torch.manual_seed(3)
    mask, kept = keep_mask(x, 0.4)
    expected = base + layer.scaling["default"] * b((x * mask / kept) @ a.T * c)
    assert num_fused(actual) == 1
    torch.testing.assert_close(actual, expected, **EXACT)
    update = base + layer.scaling["default"] * b(x @ a.T * c)
    torch.testing.assert_close(layer.eval()(x), update, **EXACT)


# -- where it steps aside ----------------------------------------------------------------------------


def first(model):
    return model.get_base_model().layers[0]


def hook(*path):
    def watch(model):
        return first(model).get_submodule(".".join(path)).register_forward_hook(lambda *_: None)

    return watch


def replaced_forward(model):
    base = first(model).base_layer
    base.forward = type(base).forward.__get__(base)


def other_dropout(model):
    first(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


WATCHED = {
    "hook on A": hook("lora_A", "default"),
    "hook on B": hook("lora_B", "default"),
    "hook on the base": hook("base_layer"),
    "hook on dropout": hook("lora_dropout", "default"),
    "base with its own forward": replaced_forward,
    "trained base weight": lambda model: first(model).base_layer.weight.requires_grad_(),
    "trained base bias": lambda model: first(model).base_layer.bias.requires_grad_(),
    "another dropout": other_dropout,
    "parametrised base": lambda model: nn.utils.parametrizations.weight_norm(
        first(model).base_layer
    ),
}


@pytest.mark.parametrize("change", WATCHED.values(), ids=WATCHED)
def test_a_layer_that_is_not_common_takes_pefts_path(change):
    fused, plain = pair()
    change(fused)
    actual = fused(data()[0])
    assert num_fused(actual) == 2
    torch.testing.assert_close(actual, plain(data()[0]), **EXACT)


@contextlib.contextmanager
def global_hook(_model):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def merged(model):
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@contextlib.contextmanager
def two_adapters(model):
    model.add_adapter("other", DynLoraConfig(init_r=2, target_r=2, target_modules=["0", "1", "2"]))
    model.base_model.set_adapter(["default", "other"])
    yield


@contextlib.contextmanager
def doubled(model):
    model.double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    yield


CONTEXTS = {
    "a hook on all modules": global_hook,
    "merged": merged,
    "two active adapters": two_adapters,
    "disabled": lambda model: model.disable_adapter(),
    "two dtypes": doubled,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_model_that_is_not_common_takes_pefts_path(context):
    fused, plain = pair()
    with context(fused), context(plain):
        x = data()[0].to(next(fused.parameters()).dtype)
        actual = fused(x)
        assert num_fused(actual) == 0
        torch.testing.assert_close(actual, plain(x), **EXACT)


def test_a_mixed_batch_takes_pefts_path():
    fused, plain = (model.eval() for model in pair())
    names = ["default", "__base__"] * 16
    actual = fused(data()[0], adapter_names=names)
    assert num_fused(actual) == 0
    torch.testing.assert_close(actual, plain(data()[0], adapter_names=names), **EXACT)


def test_function_transforms_take_pefts_path():
    fused, plain = pair()
    x = data()[0]
    for transform in (torch.func.grad, torch.func.jacrev):
        actual, expected = (
            transform(lambda v, model=model: model(v).sum())(x) for model in (fused, plain)
        )
        torch.testing.assert_close(actual, expected, **EXACT)
    actual, expected = (torch.func.vmap(model)(x) for model in (fused, plain))
    torch.testing.assert_close(actual, expected, **EXACT)


def test_a_saved_adapter_remembers_the_choice(tmp_path):
    adapted(fused=False).save_pretrained(tmp_path)
    assert DynLoraConfig.from_pretrained(tmp_path).fused is False


def test_a_convolution_takes_pefts_path():
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(3, 4, 1)), DynLoraConfig(target_r=2, target_modules=["0"])
    )
    assert num_fused(model(torch.randn(2, 3, 5))) == 0
