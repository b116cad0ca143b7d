"""The start ``gradient``: directions found through an adapter against those of the gradient itself."""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dynlora_lab.methods import AdapterOptions, Target
from dynlora_lab.methods.gradient_start import right_singular_vectors, start_along_
from tiny_methods import adapted, batches, logits, tiny

FIELDS = {"target_modules": ["layer"], "exclude_modules": None}


class Regression(nn.Module):
    """One linear layer with a loss, as a Trainer's model has one."""

    def __init__(self, inputs=30, outputs=20):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, dtype=torch.float64)

    def forward(self, x, y):
        return SimpleNamespace(loss=((self.layer(x).tanh() - y) ** 2).mean())


def regression(**sizes):
    torch.manual_seed(0)
    model = Regression(**sizes)
    inputs, outputs = model.layer.in_features, model.layer.out_features
    x = torch.randn(3, 3, inputs, dtype=torch.float64)  # nine rows: a gradient of rank nine
    y = torch.randn(3, 3, outputs, dtype=torch.float64)
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    return Target(model=model, head=[], task_type=None, seed=0, batches=lambda: rows)


def true_gradient(target, layer=None):
    for batch in target.batches():
        target.model(**batch).loss.backward()
    return (layer or target.model.layer).weight.grad.double()


def projector(rows):
    return rows.mT @ rows


def test_the_subspace_is_that_of_the_accumulated_gradient_and_b_is_0():
    target = regression()
    directions = right_singular_vectors(target, FIELDS, rank=4)
    expected = torch.linalg.svd(true_gradient(regression())).Vh
    assert torch.allclose(projector(directions["layer"][0][0, :4]), projector(expected[:4]))
    one_by_one = directions["layer"][0][0, :4] @ expected[:4].T
    assert torch.allclose(one_by_one.abs(), torch.eye(4, dtype=torch.float64))

    model = get_peft_model(target.model, LoraConfig(r=4, target_modules=["layer"]))
    start_along_(model, directions)
    layer = model.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(projector(a.double()), projector(expected[:4]), atol=1e-6)
    assert not b.any()


def test_the_base_is_left_as_it_was():
    target, fresh = regression(), regression()
    right_singular_vectors(target, FIELDS, rank=4)
    assert isinstance(target.model.layer, nn.Linear)
    assert torch.equal(target.model.layer.weight, fresh.model.layer.weight)


def test_a_layer_narrower_than_the_rank_keeps_rows_as_they_were_drawn():
    target = regression(inputs=3)
    directions = right_singular_vectors(target, FIELDS, rank=5)
    expected = torch.linalg.svd(true_gradient(regression(inputs=3))).Vh
    model = get_peft_model(target.model, LoraConfig(r=5, target_modules=["layer"]))
    a = model.base_model.model.layer.lora_A["default"].weight
    drawn = a.detach().clone()
    start_along_(model, directions)
    one_by_one = a[:3].double() @ expected.T
    assert torch.allclose(one_by_one.abs(), torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert torch.equal(a[3:], drawn[3:])


def test_in_a_recipes_lora_nearly_all_that_two_directions_can_hold_is_held():
    options = AdapterOptions(target_r=2, init_lora_weights="gradient")
    made = adapted("lora", options)
    assert torch.equal(logits(made.model), logits(tiny()))
    assert made.model.peft_config["default"].init_lora_weights is True  # a plain LoRA to PEFT
    assert made.ranks() == adapted("lora").ranks()
    model = tiny()
    for batch in batches()[:8]:
        model(**batch).loss.backward()
    for name in made.ranks():
        gradient = model.get_submodule(name).weight.grad
        a = made.model.base_model.model.get_submodule(name).lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-5)
        most = torch.linalg.svdvals(gradient)[:2].square().sum()
        assert (gradient @ a.T).square().sum() > 0.98 * most


def test_modules_of_other_ranks_start_along_as_many_directions():
    name = "bert.encoder.layer.0.attention.self.{}".format
    ranks = {name("query"): 3, name("key"): 1}
    options = AdapterOptions(target_r=2, init_lora_weights="gradient", ranks=ranks)
    made = adapted("lora", options)
    assert made.ranks() == ranks
    for module, rank in ranks.items():
        a = made.model.base_model.model.get_submodule(module).lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(rank), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_base_of_4_bits_gives_the_directions_of_its_dequantised_weights(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bit, device_map="cpu"
    )
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            plain.get_submodule(name).weight.data.copy_(weight)
    ids = torch.randint(0, 64, (2, 5))  # ten tokens: gradients of at most rank ten
    rows = [{"input_ids": ids, "labels": ids}]
    target = Target(model=model, head=[], task_type=None, seed=0, batches=lambda: rows)
    fields = {"target_modules": ["down_proj"], "exclude_modules": None}
    found = right_singular_vectors(target, fields, rank=2)
    plain(**rows[0]).loss.backward()
    assert len(found) == 2
    for name, (rows_of_a,) in found.items():
        expected = torch.linalg.svd(plain.get_submodule(name).weight.grad).Vh[:2].double()
        overlap = (rows_of_a[0, :2] @ expected.T).square().sum() / 2
        assert overlap > 0.999  # bitsandbytes computes in its own order
