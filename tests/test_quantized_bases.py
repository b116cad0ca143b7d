"""The whole life of an adapter on a base model whose weights are quantised, on the CPU.

Merging is measured against the noise that quantising the merged weights makes, not against 0.
"""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    set_seed,
)

from dynlora import DynLoraConfig, RankAllocator, export_lora

STEPS = 12
ATOL = 1e-4  # the 8-bit kernel casts its inputs to fp16, which magnifies the last bits of fp32

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


def trained(folder, name, *, compact=True, steps=STEPS, model=None, saved=None):
    """Model, allocator, optimizer and losses of a run of 12 steps, or of a part of it."""
    if model is None:
        base = prepare_model_for_kbit_training(
            quantised(folder, name), use_gradient_checkpointing=False
        )
        fields = {"init_r": 4, "target_r": 1, "prune_interval": 2, "target_modules": "all-linear"}
        set_seed(1)
        model = get_peft_model(base, DynLoraConfig(**fields, compact=compact))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS)
    if saved:
        optimizer.load_state_dict(saved[0])
        allocator.load_state_dict(saved[1])
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, allocator, optimizer, losses


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_on_a_quantised_base_ends_as_a_plain_lora(folder, name, tmp_path):
    untouched = quantised(folder, name)
    plain_outputs = logits(untouched)
    model, allocator, _, losses = trained(folder, name)
    assert losses[-1] < losses[0]
    before = logits(model)
    assert (before - plain_outputs).abs().max() > 0.1
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "plain")
    ranks = allocator.finalize_()
    assert sum(ranks.values()) == allocator.target_components
    assert 0 in ranks.values()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=ATOL)
    native = PeftModel.from_pretrained(quantised(folder, name), tmp_path / "native")
    assert torch.equal(logits(native), before)
    stock = PeftModel.from_pretrained(quantised(folder, name), tmp_path / "plain")
    assert type(stock.peft_config["default"]) is LoraConfig
    layers = [m for m in stock.modules() if isinstance(m, LoraLayer)]
    assert {type(m).__module__.partition(".")[0] for m in layers} == {"peft"}
    torch.testing.assert_close(logits(stock), before, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["bitsandbytes 8 bit", "torchao"])
def test_merging_into_a_quantised_base_keeps_the_function_but_for_rounding(folder, name):
    """On the CPU, 4-bit merges of stock LoRA change once a forward was made, so they prove nothing."""
    model = trained(folder, name)[0]
    before = logits(model)
    learnt = (before - logits(quantised(folder, name))).abs().max()
    merged = logits(model.merge_and_unload())
    assert (merged - before).abs().max() < 0.25 * learnt


@pytest.mark.parametrize("name", BASES)
def test_compaction_on_a_quantised_base_does_not_change_the_losses(folder, name):
    masked = trained(folder, name, compact=False)[3]
    compacted = trained(folder, name)[3]
    torch.testing.assert_close(compacted, masked, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stop_at", [3, 8])
@pytest.mark.parametrize("name", BASES)
def test_a_run_on_a_quantised_base_resumes_bit_for_bit(folder, name, stop_at, tmp_path):
    whole = trained(folder, name)
    first, allocator, optimizer, losses = trained(folder, name, steps=stop_at)
    first.save_pretrained(tmp_path)
    base = prepare_model_for_kbit_training(
        quantised(folder, name), use_gradient_checkpointing=False
    )
    second = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    saved = optimizer.state_dict(), allocator.state_dict()
    parts = trained(folder, name, model=second, saved=saved, steps=STEPS - stop_at)
    assert losses + parts[3] == whole[3]
    assert parts[1].ranks() == whole[1].ranks()
