"""What is measured, as data: shapes of known models with random weights, and how to adapt them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

ENCODER = {
    "hidden_dropout_prob": 0.0,  # the base model's own dropout is no part of any question here
    "attention_probs_dropout_prob": 0.0,
    "vocab_size": 1000,
}
ENCODER_TARGETS = ["query", "key", "value", "dense"]
DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """One layer of a known model.

    Attributes:
        name: the model.
        model: class of the backbone.
        config: class of its configuration.
        fields: the configuration, without the number of layers.
        targets: module names to adapt.
        depth: layers of the real model.
        options: other arguments of the model class.
    """

    name: str
    model: Any
    config: Any
    fields: dict[str, Any]
    targets: list[str]
    depth: int
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, layers: int, dtype: torch.dtype, device: str) -> nn.Module:
        """The first layers of the model, random weights, the same at every call."""
        hf.set_seed(0)
        config = self.config(num_hidden_layers=layers, **self.fields)
        return self.model(config, **self.options).to(device, dtype).train()


def _llama(hidden: int, inner: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128 if hidden > 2048 else 64,
        "vocab_size": 1000,
    }


def _decoder(name: str, depth: int, *sizes: int) -> Shape:
    return Shape(name, hf.LlamaModel, hf.LlamaConfig, _llama(*sizes), DECODER_TARGETS, depth)


ROBERTA = Shape(
    "RoBERTa-base",
    hf.RobertaModel,
    hf.RobertaConfig,
    ENCODER,
    ENCODER_TARGETS,
    12,
    {"add_pooling_layer": False},
)
LLAMA_1B = _decoder("Llama-1B", 16, 2048, 8192, 32, 8)
LLAMA_8B = _decoder("Llama-8B", 32, 4096, 14336, 32, 8)
LLAMA_70B = _decoder("Llama-70B", 80, 8192, 28672, 64, 8)


@dataclass(frozen=True)
class StepCase:
    """One comparison of training steps.

    Attributes:
        shape: the model.
        layers: how many of its layers.
        batch: sequences a step.
        length: tokens a sequence.
        dropout: lora_dropout of all arms.
        target_r: rank of plain LoRA, and mean rank at the end of ours.
        init_r: rank at the start of ours.
        dtype: of base model and adapter.
        is_4bit: whether the targeted layers of the base are in 4 bit.
    """

    shape: Shape
    layers: int
    batch: int
    length: int
    dropout: float = 0.0
    target_r: int = 8
    init_r: int = 12
    dtype: torch.dtype = field(default=torch.float32)
    is_4bit: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """How tables call it."""
        size = f"{self.layers} of {self.shape.depth} layers, {self.batch}x{self.length} tokens"
        kind = str(self.dtype).removeprefix("torch.") + ", base in 4 bit" * self.is_4bit
        return f"{self.shape.name}, {size}, r {self.target_r}, dropout {self.dropout}, {kind}"

    def inputs(self, device: str) -> Tensor:
        """Embeddings that need a gradient: the layers measured stand for inner ones."""
        width = self.shape.fields.get("hidden_size", 768)
        draws = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, self.length, width, generator=draws)
        return x.to(device, self.dtype).requires_grad_()


STEP_CASES = {
    "cpu": [
        StepCase(ROBERTA, 1, 16, 128),
        StepCase(ROBERTA, 1, 16, 128, dropout=0.1),
        StepCase(ROBERTA, 4, 8, 64),
        StepCase(LLAMA_1B, 1, 1, 256),
    ],
    "cuda": [
        *(
            StepCase(shape, layers, 8, 512, dropout, rank, rank * 3 // 2, torch.bfloat16)
            for shape, layers in ((ROBERTA, 12), (LLAMA_1B, 16), (LLAMA_8B, 4))
            for dropout in (0.0, 0.1)
            for rank in (2, 8, 16, 64)
        )
    ],
}

FOUR_BIT_CASES = {
    "cpu": [
        StepCase(shape, 1, batch, length, dropout, is_4bit=True)
        for shape, batch, length in ((ROBERTA, 16, 128), (LLAMA_1B, 1, 256))
        for dropout in (0.0, 0.1)
    ],
    "cuda": [
        StepCase(LLAMA_8B, 4, 8, 512, dropout, 16, 24, torch.bfloat16, is_4bit=True)
        for dropout in (0.0, 0.1)
    ],
}
