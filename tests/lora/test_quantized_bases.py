"""The whole life of an adapter on a base model whose weights are quantised, on the CPU.

Merging is measured against the noise that quantising the merged weights makes, not against 0.
"""

import logging

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    set_seed,
)

from dynlora import RankAllocator

STEPS = 12

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the libraries' own
    pytest.mark.filterwarnings("error:.*:Warning:dynlora"),
]


def four_bit():
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def eight_bit():
    pytest.importorskip("bitsandbytes", reason="8-bit bases need bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def int8_weights():
    torchao = pytest.importorskip("torchao.quantization", reason="int8 bases need torchao")
    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


BASES = {"bitsandbytes 4 bit": four_bit, "bitsandbytes 8 bit": eight_bit, "torchao": int8_weights}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers, 64 wide: one block of 4-bit codes is 64 values."""
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def quantised(folder, name):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BASES[name](), device_map="cpu"
    ).eval()


def ids():
    return torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def trained(folder, name, *, compact=True, steps=STEPS, saved=None):
    """Model, allocator, optimizer and losses of a run of 12 steps, or of a part of it."""
    base = prepare_model_for_kbit_training(
        quantised(folder, name), use_gradient_checkpointing=False
    )
    set_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    allocator = RankAllocator(
        model, optimizer, total_steps=STEPS, target_r=1, prune_interval=2, compact=compact
    )
    if saved:
        set_peft_model_state_dict(model, load_file(saved[0] / "adapter_model.safetensors"))
        optimizer.load_state_dict(saved[1])
        allocator.load_state_dict(saved[2])
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, allocator, optimizer, losses


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_on_a_quantised_base_ends_as_a_plain_lora(folder, name, tmp_path):
    plain_outputs = logits(quantised(folder, name))
    model, allocator, _, losses = trained(folder, name)
    assert losses[-1] < losses[0]
    before = logits(model)
    assert (before - plain_outputs).abs().max() > 0.1
    ranks = allocator.finalize_()
    assert allocator.cost <= allocator.target_cost
    assert 0 in ranks.values()
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(quantised(folder, name), tmp_path)
    layers = [m for m in stock.modules() if isinstance(m, LoraLayer)]
    assert {type(m).__module__.partition(".")[0] for m in layers} == {"peft"}
    assert torch.equal(logits(stock), before)


@pytest.mark.parametrize("name", ["bitsandbytes 8 bit", "torchao"])
def test_merging_into_a_quantised_base_keeps_the_function_but_for_rounding(folder, name, tmp_path):
    """On the CPU, 4-bit merges of stock LoRA change once a forward was made, so they prove nothing."""
    trained(folder, name)[0].save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantised(folder, name), tmp_path)
    before = logits(model)
    learnt = (before - logits(quantised(folder, name))).abs().max()
    merged = logits(model.merge_and_unload())
    assert (merged - before).abs().max() < 0.25 * learnt


@pytest.mark.parametrize("name", BASES)
def test_compaction_and_a_resume_do_not_change_the_losses(folder, name, tmp_path):
    masked = trained(folder, name, compact=False)[3]
    whole = trained(folder, name)
    torch.testing.assert_close(whole[3], masked, rtol=1e-6, atol=0)
    for stop in (3, 8):
        first, allocator, optimizer, losses = trained(folder, name, steps=stop)
        first.save_pretrained(tmp_path / str(stop))
        saved = tmp_path / str(stop), optimizer.state_dict(), allocator.state_dict()
        parts = trained(folder, name, saved=saved, steps=STEPS - stop)
        assert losses + parts[3] == whole[3]
        assert parts[1].ranks() == whole[1].ranks()
