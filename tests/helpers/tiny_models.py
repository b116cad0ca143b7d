"""Random models of a few thousand parameters, one per architecture, and a short training loop."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from dynlora import DynLoraConfig, RankAllocator
from dynlora.lora.components import find_components
from small_net import SETTINGS

VOCABULARY = 40


def tiny_llama():
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def tiny_bert():
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
        )
    ).eval()


def tiny_gpt2():
    """Its linear layers are transformers' Conv1D."""
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def tiny_t5():
    set_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny_experts():
    """Its experts are fused into one tensor each, adapted by ``target_parameters=EXPERTS``."""
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = MixtralConfig(
        **sizes, **heads, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


KINDS = ("embedding", "hf_conv1d", "conv1d", "conv2d", "mha", "linear")


class LayerKinds(nn.Module):
    """Every kind of layer that PEFT's LoRA adapts, in one row; each is named by its kind.

    Attention stands before transformers' Conv1D, after which PEFT would take its output projection
    for a transposed one.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 6, 3, padding=1)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hf_conv1d = Conv1D(8, 8)
        self.linear = nn.Linear(8, 5)

    def forward(self, input_ids):
        x = torch.tanh(self.conv1d(self.embedding(input_ids).transpose(1, 2))).transpose(1, 2)
        x = torch.tanh(self.conv2d(x.unsqueeze(1))).mean(1)
        x, _ = self.mha(x, x, x, need_weights=False)
        return self.linear(3 * x + self.hf_conv1d(x.contiguous()))


def layer_kinds():
    set_seed(0)
    return LayerKinds().eval()


EVERY_LAYER = [
    (layer_kinds, {"target_modules": ["embedding", "conv1d", "conv2d", "mha", "hf_conv1d"]}),
    (tiny_experts, {"target_parameters": EXPERTS}),
]
"""Models and what of a LoraConfig adapts all that may be turned in them."""


def random_lora(build, fields):
    """A LoRA of rank 3 with random factors."""
    model = get_peft_model(build(), LoraConfig(r=3, **fields))
    for module in find_components(model, "default"):
        for factor in module.factors:
            factor.parameter.data = 0.3 * torch.randn(factor.parameter.shape)
    return model


def batch(model):
    """Deterministic inputs, labels included where the base model has a loss."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=draws)
    if isinstance(model, BertForSequenceClassification):
        return {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    return (
        {"input_ids": ids} if isinstance(model, LayerKinds) else {"input_ids": ids, "labels": ids}
    )


@torch.no_grad()
def logits(model):
    """What the model, adapted or not, says to its batch in evaluation mode."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = model.training
    output = model.eval()(**batch(base))
    model.train(was_training)
    return output if isinstance(output, torch.Tensor) else output.logits


BUDGET = {"target_r": 1, "prune_interval": 2}
"""So poor that some module ends at rank 0, but only at the freeze."""


def train(model, *, steps=12, total_steps=None, lr=2e-2, adapter=None, **settings):
    """Train the adapter for some steps with a RankAllocator; the run is not finalized.

    Settings are those of ``BUDGET`` but for the given ones, or a gated adapter's own.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    if not any(isinstance(c, DynLoraConfig) for c in base.peft_config.values()):
        settings = {**BUDGET, **settings}
    allocator = RankAllocator(
        model, optimizer, total_steps=total_steps or steps, adapter=adapter, **settings
    )
    inputs = batch(base)
    target = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(2))
    model.train()
    for _ in range(steps):
        output = model(**inputs)
        loss = ((output - target) ** 2).mean() if torch.is_tensor(output) else output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return allocator


def config(*, gated=False, **fields):
    """A stock LoraConfig of rank 4, or with ``gated`` a DynLoraConfig with ``BUDGET``."""
    fields = {"target_modules": "all-linear", "lora_alpha": 8, **fields}
    if gated:
        return DynLoraConfig(**{"init_r": fields.pop("r", 4), **BUDGET, **fields})
    assert not SETTINGS & fields.keys(), "settings go to train()"
    return LoraConfig(**{"r": 4, **fields})


def adapted(build=tiny_llama, **fields):
    return get_peft_model(build(), config(**fields))
