"""Compiled, a fused model is PEFT's compiled model: its losses to the bit, and not a graph break more."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters

import tiny_models
from dynlora.fused import fuse_
from fused_nets import EXACT, adapted, first, gradients, num_fused, pair
from small_net import data


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_run(model, forward, *, backend):
    """Output and gradients of the compiled model, and what the compiler did for it."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend)
    torch.manual_seed(5)  # of a dropout
    output = forward(compiled)
    found = (output, gradients(model, output))
    return found, {name: dict(counters[name]) for name in ("graph_break", "frames")}


def assert_compiled_alike(models, forward, *, backend):
    """The fused model first: what it computes is PEFT's to the bit, and so is what was compiled."""
    (ours, our_work), (theirs, their_work) = (
        compiled_run(m, forward, backend=backend) for m in models
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert our_work == their_work
    assert our_work["graph_break"] == {}


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_a_compiled_fused_net_is_pefts_compiled_net(lora_dropout, is_autocast):
    def forward(net):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            return net(data()[0])

    models = pair(lora_dropout=lora_dropout)
    assert_compiled_alike(models, forward, backend="aot_eager")
    assert num_fused(forward(models[0])) == 2  # not compiled, it is fused as before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_makes_the_same_code_of_a_fused_net():
    assert_compiled_alike(pair(), lambda net: net(data()[0]), backend="inductor")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compiled_fused_llama_is_pefts_compiled_llama():
    def built(*, is_fused):
        config = LoraConfig(r=4, target_modules="all-linear")
        model = get_peft_model(tiny_models.tiny_llama(), config).train()
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        assert not is_fused or fuse_(model) > 10
        return model

    def forward(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).logits

    models = (built(is_fused=True), built(is_fused=False))
    batch = tiny_models.batch(models[0].get_base_model())
    assert_compiled_alike(models, forward, backend="aot_eager")


def test_a_compiled_layer_follows_changes_of_rank_and_scaling():
    layer = first(pair()[0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = data()[0]
    for scale, rank in ((1.0, 4), (0.3, 3), (2.5, 3), (0.7, 1), (0.7, 0)):
        layer.set_scale("default", scale)
        for module, dim in ((layer.lora_A["default"], 0), (layer.lora_B["default"], 1)):
            module.weight = nn.Parameter(module.weight.detach().narrow(dim, 0, rank).clone())
        actual, expected = compiled(x), layer(x)
        torch.testing.assert_close(actual, expected, **EXACT)
        torch.testing.assert_close(gradients(layer, actual), gradients(layer, expected), **EXACT)


def test_a_layer_switched_between_two_calls_is_compiled_for_each():
    """Both ways of a layer to be called stay right when one model is called compiled and not."""
    model = adapted(target_modules=["0"])
    fuse_(model)
    layer, x = first(model), data()[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs = [call(x) for call in (layer, compiled, layer, compiled)]
    assert [num_fused(output) for output in outputs] == [1, 0, 1, 0]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], **EXACT)
