"""``inspect_adapter``: the figures of any adapter folder, from its header, without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import consumers
from dynlora.adapter.components import find_gated_layers
from dynlora.export import export_adapter
from dynlora.report.adapter_file import effective_rank, inspect_adapter
from tiny_models import adapted, tiny_bert, tiny_llama, train


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted(tiny_llama)
    allocator = train(model, steps=30, total_steps=40)
    model.save_pretrained(folder / "native")
    return folder / "native", model, allocator


def test_a_native_checkpoint_tells_its_budget_and_ranks(native):
    folder, model, allocator = native
    facts = inspect_adapter(folder)
    assert (facts.kind, facts.init_r, facts.target_r) == ("native", 4, 1)
    assert facts.ranks == dict(sorted(allocator.ranks().items()))
    assert facts.num_parameters == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(".default.weight")
    )
    assert facts.scales == (2.0, 2.0)  # lora_alpha 8 / init_r 4, though ranks have changed
    assert facts.served_by == ["PEFT with dynlora"]


@pytest.mark.parametrize(("form", "readers"), [("ragged", "diffusers"), ("uniform", "llama.cpp")])
def test_exports_tell_who_reads_them(native, tmp_path, form, readers):
    folder, _, allocator = native
    export_adapter(folder, tmp_path / "out", to=form)
    facts = inspect_adapter(tmp_path / "out")
    assert readers in facts.served_by
    assert facts.scales == (1.0, 1.0)
    assert ("llama.cpp" in facts.served_by) == (form == "uniform")
    if form == "ragged":
        assert facts.ranks == dict(sorted(allocator.ranks().items()))
        assert "dynlora export --to uniform" in facts.note


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_a_trained_head_is_not_said_to_be_served_where_it_is_refused(tmp_path, form):
    model = adapted(tiny_bert, task_type="SEQ_CLS")
    for gated in find_gated_layers(model, "default"):
        torch.nn.init.ones_(gated.gate)
    model.save_pretrained(tmp_path / "native")
    export_adapter(tmp_path / "native", tmp_path / form, to=form)
    for refuses in (consumers.vllm, consumers.llama_cpp):
        with pytest.raises(consumers.RefusedError):
            refuses(tmp_path / form)
    facts = inspect_adapter(tmp_path / form)
    assert facts.served_by == ["PEFT", "transformers"]
    assert facts.heads == 2  # weight and bias of the classifier
    assert "--to merged" in facts.note


def test_a_lora_from_elsewhere_tells_what_a_budget_could_save(tmp_path):
    """Two of six components carry the update; in bfloat16, which numpy cannot read by itself."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=6, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p[:, :2] = torch.eye(16)[:, :2]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    facts = inspect_adapter(tmp_path, effective=True)
    assert facts.kind == "plain LoRA"
    assert facts.dtypes == ["BF16"]
    assert set(facts.effective_ranks.values()) == {2}
    assert facts.saving == pytest.approx(2 / 3)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_the_effective_rank_is_that_of_the_dense_product(rank):
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=(6, 9)), draws.normal(size=(7, 6))
    b[:, rank:] = 0
    values = np.linalg.svd(b @ a, compute_uv=False) ** 2
    total = values.sum()
    expected = next((i for i in range(7) if values[:i].sum() >= 0.99 * total), 6) if total else 0
    assert effective_rank(a, b) == expected


def test_it_needs_no_torch(native):
    code = (
        "import sys, types; package = types.ModuleType('dynlora'); package.__path__ = [sys.argv[1]];"
        "sys.modules['dynlora'] = package; sys.modules['torch'] = None;"
        "from dynlora.report.adapter_file import inspect_adapter;"
        "print(inspect_adapter(sys.argv[2], effective=True).kind)"
    )
    import dynlora

    command = [sys.executable, "-c", code, dynlora.__path__[0], str(native[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "native"


def test_damaged_folders_are_named(native, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    content = (native[0] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="adapter_config.json is not a JSON object"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for damaged in (content[:-20], content[:40], b"", b"\xff" * 64):
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            inspect_adapter(tmp_path)
