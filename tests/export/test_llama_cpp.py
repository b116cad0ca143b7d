"""llama.cpp's own converter on our adapters: what its runtime is to add is what was trained.

``LLAMA_CPP`` names a folder with its sources, such as ``vendor/llama.cpp`` of llama-cpp-python's sdist.
The runtime multiplies each pair by alpha / rank of the pair (``llama-adapter.h``); it is not run here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import consumers
from dynlora import export_lora
from dynlora.export import export_adapter
from tiny_models import adapted, tiny_llama, train

SOURCES = os.environ.get("LLAMA_CPP")
HEADS = 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SOURCES is None, reason="LLAMA_CPP names no folder with its sources"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trained adapter with a pruned module, in both forms, and its base."""
    root = tmp_path_factory.mktemp("llama_cpp")
    tiny_llama().save_pretrained(root / "base")
    model = adapted(tiny_llama, gated=True, init_r=4, target_r=1)
    assert 0 in train(model, steps=12, total_steps=12).ranks().values()
    export_lora(model, root / "trained")
    for form in ("ragged", "uniform"):
        export_adapter(root / "trained", root / form, to=form, base=str(root / "base"))
    return root


def converted(folder, base, file):
    """ΔW by module name, as the runtime adds it, from the file that the converter wrote."""
    script = Path(SOURCES) / "convert_lora_to_gguf.py"
    words = [sys.executable, "-W", "ignore", script, folder, "--base", base]
    subprocess.run([*words, "--outfile", file, "--outtype", "f32"], check=True, capture_output=True)
    from gguf import GGUFReader  # only here: nothing else needs it

    reader = GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    deltas = {}
    for layer in range(2):
        for name, short in NAMES.items():
            key = f"blk.{layer}.{short}.weight"
            if f"{key}.lora_a" in tensors:
                a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
                deltas[f"model.layers.{layer}.{name}"] = b @ a * (alpha / b.shape[1])
    return deltas


def as_it_orders_rows(name, delta):
    """Its rotary embedding pairs neighbouring rows of a head, where transformers pairs its halves."""
    if not name.endswith(("q_proj", "k_proj")):
        return delta
    halves = delta.reshape(HEADS, 2, -1, delta.shape[1])
    return halves.transpose(1, 2).reshape(delta.shape)


@pytest.mark.parametrize("form", ["uniform", "ragged"])
def test_its_converter_keeps_the_update_of_the_uniform_form_only(folders, tmp_path, form):
    trained = {
        name: as_it_orders_rows(name, delta)
        for name, delta in consumers.diffusers(folders / "ragged").items()
    }
    found = converted(folders / form, folders / "base", tmp_path / "adapter.gguf")
    assert any(delta.abs().max() > 1e-3 for delta in trained.values())  # not the base's answer
    is_same = [
        torch.allclose(found[n], trained.get(n, torch.zeros(())), rtol=0, atol=1e-6) for n in found
    ]
    assert trained.keys() <= found.keys()
    assert all(is_same) if form == "uniform" else not all(is_same)
