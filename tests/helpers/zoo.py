"""A tiny random model of every architecture that is fine-tuned a lot, with a batch it can learn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from peft import TaskType
from torch import nn

from tiny_models import VOCABULARY, LayerKinds

ROWS, LENGTH = 3, 6
PICTURE = VOCABULARY - 1  # the token that stands for a part of a picture


@dataclass(frozen=True)
class Species:
    """One architecture: how to build it, what to feed it, where its output is.

    Attributes:
        name: test id; names what is adapted where that is not every linear layer.
        model: class of the model.
        config: its configuration.
        inputs: a batch with labels.
        adapter: LoraConfig fields beside the common ones.
        output: name of the output to compare.
        drift: how far two equal runs may end apart, relative to the largest weight.
        is_slow: whether it lives among the slow tests only.
    """

    name: str
    model: type[nn.Module]
    config: Any
    inputs: Callable[[], dict[str, Any]]
    adapter: dict[str, Any] = field(default_factory=dict)
    output: str = "logits"
    drift: float = 0.0
    is_slow: bool = False

    def build(self) -> nn.Module:
        """The same model at every call."""
        hf.set_seed(0)
        return self.model(self.config).eval()


class LayerKindsWithLoss(LayerKinds):
    """Conv1d, Conv2d, Embedding, MultiheadAttention and Linear in one model."""

    def __init__(self, _config):
        super().__init__()

    def forward(self, input_ids, labels):
        logits = super().forward(input_ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 5)
        return hf.modeling_outputs.TokenClassifierOutput(loss=loss, logits=logits)


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def token_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=_random())


def sentences() -> dict[str, Any]:
    return {"input_ids": token_ids(), "labels": torch.tensor([0, 1, 2])}


def text() -> dict[str, Any]:
    return {"input_ids": token_ids(), "labels": token_ids()}


def pixels() -> torch.Tensor:
    return torch.randn(ROWS, 3, 16, 16, generator=_random())


def pictures() -> dict[str, Any]:
    return {"pixel_values": pixels(), "labels": torch.tensor([0, 1, 2])}


def captioned_pictures() -> dict[str, Any]:
    return {"input_ids": token_ids(), "pixel_values": pixels(), "return_loss": True}


def text_with_pictures() -> dict[str, Any]:
    """Each row begins with the four tokens of its picture."""
    ids = torch.cat([torch.full((ROWS, 4), PICTURE), token_ids().clamp(max=PICTURE - 1)], dim=1)
    return {"input_ids": ids, "pixel_values": pixels().unsqueeze(1), "labels": ids}


def text_with_patches() -> dict[str, Any]:
    """As above, of pictures cut into 16 patches, which are merged into four tokens."""
    ids = text_with_pictures()["input_ids"]
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(ROWS * 16, 3 * 2 * 4 * 4, generator=_random()),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
        "mm_token_type_ids": (ids == PICTURE).int(),
        "labels": ids,
    }


def speech() -> dict[str, Any]:
    return {"input_features": torch.randn(ROWS, 8, 24, generator=_random()), "labels": token_ids()}


ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
DECODER = ENCODER | {"num_key_value_heads": 1, "head_dim": 8}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
CLASSIFY = {"task_type": TaskType.SEQ_CLS}
CAUSAL = {"task_type": TaskType.CAUSAL_LM}
TRANSLATE = {"task_type": TaskType.SEQ_2_SEQ_LM}

ZOO = [
    Species(
        "roberta",
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**ENCODER, num_labels=3),
        sentences,
        CLASSIFY,
    ),
    Species(
        "bert",
        hf.BertForSequenceClassification,
        hf.BertConfig(**ENCODER, num_labels=3),
        sentences,
        CLASSIFY,
    ),
    Species(
        "distilbert",
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=3
        ),
        sentences,
        # "all-linear" would adapt it; PEFT saves as a whole whatever has "classifier" in its name
        CLASSIFY | {"exclude_modules": ["pre_classifier"]},
    ),
    Species(
        "deberta_v3",
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(
            **ENCODER,
            num_labels=3,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
        sentences,
        CLASSIFY,
    ),
    Species("bart", hf.BartForConditionalGeneration, hf.BartConfig(**SEQ2SEQ), text, TRANSLATE),
    Species(
        "t5",
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        text,
        TRANSLATE,
    ),
    Species("marian", hf.MarianMTModel, hf.MarianConfig(**SEQ2SEQ), text, TRANSLATE),
    Species(
        "gpt2_conv1d",
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
        text,
        CAUSAL | {"fan_in_fan_out": True},
    ),
    Species("llama", hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER), text, CAUSAL),
    Species("qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config(**DECODER), text, CAUSAL),
    Species("gemma3", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**DECODER), text, CAUSAL),
    Species(
        "mixtral",
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2),
        text,
        CAUSAL | {"lora_dropout": 0.0},  # its experts are fused into one tensor each
    ),
    Species(
        "qwen2_moe_attention_and_shared_expert",
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(
            **DECODER,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=12,
        ),
        text,
        CAUSAL,
    ),
    Species(
        "vit",
        hf.ViTForImageClassification,
        hf.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=3),
        pictures,
        {"modules_to_save": ["classifier"]},
    ),
    Species(
        "clip",
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config=ENCODER | {"bos_token_id": 0, "eos_token_id": 2},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            projection_dim=8,
        ),
        captioned_pictures,
        output="logits_per_image",
    ),
    Species(
        "whisper",
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=16,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        speech,
    ),
    Species(
        "embedding_convolutions_linear",
        LayerKindsWithLoss,
        None,
        text,
        {"target_modules": ["embedding", "conv1d", "conv2d", "linear"]},
    ),
    Species(
        "multihead_attention",
        LayerKindsWithLoss,
        None,
        text,
        {"target_modules": ["mha", "linear"]},
        drift=1e-4,  # PEFT adds ΔW to the base weights in each forward and subtracts it again
    ),
    Species(
        "qwen3_moe",
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(
            **DECODER, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
        ),
        text,
        CAUSAL | {"lora_dropout": 0.0},
        is_slow=True,
    ),
    Species(
        "gpt_oss",
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2, sliding_window=4),
        text,
        CAUSAL | {"lora_dropout": 0.0},
        is_slow=True,
    ),
    Species(
        "deepseek_v3",
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **ENCODER,
            num_key_value_heads=2,
            moe_intermediate_size=12,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        text,
        CAUSAL | {"lora_dropout": 0.0},
        is_slow=True,
    ),
    Species(
        "mamba",
        hf.MambaForCausalLM,
        hf.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            state_size=4,
            num_hidden_layers=2,
            time_step_rank=2,
            use_cache=False,
        ),
        text,
        CAUSAL | {"target_modules": ["in_proj", "x_proj"]},  # PEFT refuses out_proj
        is_slow=True,
    ),
    Species(
        "jamba_mamba_and_attention",
        hf.JambaForCausalLM,
        hf.JambaConfig(
            **ENCODER,
            num_key_value_heads=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=3,
            mamba_d_state=4,
            mamba_dt_rank=2,
            use_mamba_kernels=False,
            use_cache=False,
            pad_token_id=0,
        ),
        text,
        CAUSAL | {"target_modules": ["in_proj", "q_proj", "v_proj", "gate_proj", "down_proj"]},
        is_slow=True,
    ),
    Species(
        "smolvlm",
        hf.SmolVLMForConditionalGeneration,
        hf.SmolVLMConfig(
            text_config={"model_type": "llama", **DECODER},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            image_token_id=PICTURE,
            scale_factor=1,
            use_cache=False,
        ),
        text_with_pictures,
        is_slow=True,
    ),
    Species(
        "qwen2_5_vl",
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig(
            text_config={k: v for k, v in DECODER.items() if k != "head_dim"}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
            | {"bos_token_id": 0, "eos_token_id": 2},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 8,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [1],
            },
            image_token_id=PICTURE,
            video_token_id=1,
        ),
        text_with_patches,
        is_slow=True,
    ),
]
