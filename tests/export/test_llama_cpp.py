"""llama.cpp itself on our adapters: its converter, and where xllamacpp is installed, its server.

``LLAMA_CPP`` names a folder with its sources, such as ``vendor/llama.cpp`` of llama-cpp-python's sdist.
xllamacpp's wheel holds the server, which multiplies each pair by alpha / rank of the pair.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

import consumers
from greedy_llama import FORMS, NEW_TOKENS, answers, random_llama, write_forms

SOURCES = os.environ.get("LLAMA_CPP")
HEADS = 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
WORDS = ["<unk>", "<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(SOURCES is None, reason="LLAMA_CPP names no folder with its sources"),
]


def script(name, *words):
    words = [sys.executable, "-W", "ignore", Path(SOURCES) / name, *words, "--outtype", "f32"]
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a base, both forms of an adapter, these as GGUF files too, and prompts."""
    root = tmp_path_factory.mktemp("llama_cpp")
    prompts = write_forms(root, len(WORDS))
    for form in FORMS:
        out = ["--base", root / "base", "--outfile", root / f"{form}.gguf"]
        script("convert_lora_to_gguf.py", root / form, *out)
    return root, prompts


def deltas(file):
    """ΔW by module name, as the runtime adds it, from the file that the converter wrote."""
    from gguf import GGUFReader  # only here: nothing else needs it

    reader = GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    found = {}
    for layer in range(2):
        for name, short in NAMES.items():
            key = f"blk.{layer}.{short}.weight"
            if f"{key}.lora_a" in tensors:
                a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
                found[f"model.layers.{layer}.{name}"] = b @ a * (alpha / b.shape[1])
    return found


def as_it_orders_rows(name, delta):
    """Its rotary embedding pairs neighbouring rows of a head, where transformers pairs its halves."""
    if not name.endswith(("q_proj", "k_proj")):
        return delta
    halves = delta.reshape(HEADS, 2, -1, delta.shape[1])
    return halves.transpose(1, 2).reshape(delta.shape)


@pytest.mark.parametrize("form", FORMS)
def test_its_converter_keeps_the_update_of_the_uniform_form_only(served, form):
    folder, _ = served
    trained = {
        name: as_it_orders_rows(name, delta)
        for name, delta in consumers.diffusers(folder / "ragged").items()
    }
    found = deltas(folder / f"{form}.gguf")
    assert any(delta.abs().max() > 1e-3 for delta in trained.values())  # not the base's answer
    is_same = [
        torch.allclose(found[n], trained.get(n, torch.zeros(())), rtol=0, atol=1e-5) for n in found
    ]
    assert trained.keys() <= found.keys()
    assert all(is_same) if form == "uniform" else not all(is_same)


def write_base_gguf(folder):
    """With a tokenizer, which the converter wants: one of letters."""
    model = tokenizers.models.BPE({w: i for i, w in enumerate(WORDS)}, [], byte_fallback=True)
    words = tokenizers.Tokenizer(model)
    words.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback()])
    special = {"unk_token": WORDS[0], "bos_token": WORDS[2], "eos_token": WORDS[3]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=WORDS[1], **special)
    tokenizer.save_pretrained(folder / "base")
    script("convert_hf_to_gguf.py", folder / "base", "--outfile", folder / "base.gguf")


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("xllamacpp", "sentencepiece")),
    reason="xllamacpp, or sentencepiece for the base's converter, is not installed",
)
def test_its_server_answers_as_peft_does_by_the_uniform_form_only(served):
    import xllamacpp as llama_cpp

    folder, prompts = served
    write_base_gguf(folder)

    def said(form=None):
        settings = llama_cpp.CommonParams()
        settings.model.path = str(folder / "base.gguf")
        loras = [llama_cpp.CommonAdapterLoraInfo(str(folder / f"{form}.gguf"), 1.0)] if form else []
        exact = llama_cpp.ggml_type.GGML_TYPE_F32
        for part, name, value in [
            (settings, "n_ctx", 128),
            (settings, "n_parallel", 1),
            (settings, "lora_adapters", loras),
            (settings, "cache_type_k", exact),
            (settings, "cache_type_v", exact),
            (
                settings.cpuparams,
                "n_threads",
                1,
            ),  # more wait long for one another when CPUs are few
        ]:
            setattr(part, name, value)
        server = llama_cpp.Server(settings)
        asked = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "verbose": True}
        asked["return_tokens"] = True
        made = [server.handle_completions({"prompt": ids, **asked}) for ids in prompts]
        return [answer["__verbose"]["tokens"] for answer in made]

    base = random_llama(len(WORDS))
    never = {"suppress_tokens": [WORDS.index("</s>")]}  # which is what its ignore_eos does
    told = answers(base, prompts, **never)
    expected = answers(PeftModel.from_pretrained(base, folder / "trained"), prompts, **never)
    assert all(one != other for one, other in zip(told, expected, strict=True))
    assert said() == told
    assert said("uniform") == expected
    assert all(one != other for one, other in zip(said("ragged"), expected, strict=True))
