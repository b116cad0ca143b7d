"""``inspect_adapter``: the figures of any adapter folder, from its header, without torch."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import consumers
from dynlora.export import export_adapter
from dynlora.lora.components import find_components
from dynlora.report.inspection import inspect_adapter
from tiny_models import adapted, tiny_bert, tiny_llama, train


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted(tiny_llama, gated=True)
    allocator = train(model, steps=30, total_steps=40)
    model.save_pretrained(folder / "native")
    tiny_llama().save_pretrained(folder / "base")
    return folder / "native", model, allocator


def living(allocator):
    """Ranks of the modules that a folder without a history can know of."""
    return {name: rank for name, rank in sorted(allocator.ranks().items()) if rank}


def test_a_native_checkpoint_tells_its_budget_and_ranks(native):
    folder, model, allocator = native
    facts = inspect_adapter(folder)
    assert (facts.kind, facts.init_r, facts.target_r) == ("native", 4, 1)
    assert facts.ranks == living(allocator)
    assert facts.num_parameters == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(".default.weight")
    )
    assert facts.scales == (2.0, 2.0)  # lora_alpha 8 / init_r 4, though ranks have changed
    assert facts.served_by == ["PEFT with dynlora"]


@pytest.mark.parametrize(("form", "readers"), [("ragged", "diffusers"), ("uniform", "llama.cpp")])
def test_exports_tell_who_reads_them(native, tmp_path, form, readers):
    folder, _, allocator = native
    export_adapter(folder, tmp_path / "out", to=form, base=str(folder.parent / "base"))
    facts = inspect_adapter(tmp_path / "out")
    assert readers in facts.served_by
    assert facts.scales == (1.0, 1.0)
    assert ("llama.cpp" in facts.served_by) == (form == "uniform")
    if form == "ragged":
        assert facts.ranks == living(allocator)
        assert "dynlora export --to uniform" in facts.note


@pytest.mark.parametrize("form", ["ragged", "uniform"])
def test_a_trained_head_is_not_said_to_be_served_where_it_is_refused(tmp_path, form):
    model = adapted(tiny_bert, gated=True, task_type="SEQ_CLS")
    for gated in find_components(model, "default"):
        torch.nn.init.ones_(gated.pairs[0][1].parameter)  # B starts at 0
    model.save_pretrained(tmp_path / "native")
    export_adapter(tmp_path / "native", tmp_path / form, to=form)
    for refuses in (consumers.vllm, consumers.llama_cpp):
        with pytest.raises(consumers.RefusedError):
            refuses(tmp_path / form)
    facts = inspect_adapter(tmp_path / form)
    assert facts.served_by == ["PEFT", "transformers"]
    assert facts.heads == 2  # weight and bias of the classifier
    assert "--to merged" in facts.note


# -- what PEFT would load as nothing, or not at all ----------------------------------------------


def plain(folder, **fields):
    """The folder of a plain LoRA of three modules, one of them smaller."""
    config = {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        **fields,
    }
    get_peft_model(tiny_llama(), LoraConfig(**config)).save_pretrained(folder)
    return folder


def rename(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file({change(k): v.clone() for k, v in load_file(file).items()}, file)


def configure(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (lambda f: rename(f, lambda k: f"_orig_mod.{k}"), "'_orig_mod.base_model"),
        (lambda f: rename(f, lambda k: k.replace("model.model.", "model._orig_mod.")), "hold no wrapper"),
        (lambda f: rename(f, lambda k: k.removeprefix("base_model.model.")), "matches no module of PEFT's"),
        (lambda f: configure(f, rank_pattern={"down_proj": 2}), "but adapter_config.json says"),
        (lambda f: configure(f, target_modules=["q_proj"]), "does not match target_modules"),
        (lambda f: configure(f, exclude_modules=["up_proj"]), "does not match target_modules"),
        (lambda f: rename(f, lambda k: k.replace("lora_B.weight", "magnitude_vector")), "has no lora_B"),
    ],
)  # fmt: skip
def test_what_peft_cannot_use_is_served_by_nothing(tmp_path, damage, note):
    assert "vLLM" in inspect_adapter(plain(tmp_path)).served_by
    damage(tmp_path)
    facts = inspect_adapter(tmp_path)
    assert facts.served_by == []
    assert note in facts.note


def test_a_module_that_the_user_excluded_is_not_called_pruned(tmp_path):
    excluded = "model.layers.0.self_attn.q_proj"
    plain(tmp_path, r=8, rank_pattern={}, target_modules=["q_proj"], exclude_modules=[excluded])
    facts = inspect_adapter(tmp_path)
    assert facts.ranks == {"model.layers.1.self_attn.q_proj": 8}
    assert {"llama.cpp", "SGLang", "LoRAX"} <= set(facts.served_by)


@pytest.mark.parametrize("place", [".", ".."])
def test_a_module_that_the_history_beside_it_names_was_pruned(tmp_path, place):
    folder = tmp_path / "checkpoint-5"
    plain(folder, exclude_modules=["model.layers.0.self_attn.q_proj"])
    start = {"event": "start", "step": 0, "ranks": dict.fromkeys(inspect_adapter(folder).ranks, 4)}
    start["ranks"]["model.layers.0.self_attn.q_proj"] = 4
    (folder / place / "history.jsonl").write_text(json.dumps(start) + "\n")
    assert inspect_adapter(folder).ranks["model.layers.0.self_attn.q_proj"] == 0
    del start["ranks"]["model.layers.1.mlp.up_proj"]  # the history of another adapter
    (folder / place / "history.jsonl").write_text(json.dumps(start) + "\n")
    assert "model.layers.0.self_attn.q_proj" not in inspect_adapter(folder).ranks


def test_servers_that_want_every_layer_or_q_proj_are_named_only_where_they_get_them(tmp_path):
    targets = ["model.layers.0.self_attn.k_proj", "up_proj"]
    facts = inspect_adapter(plain(tmp_path, r=8, rank_pattern={}, target_modules=targets))
    assert facts.served_by == ["PEFT", "transformers", "vLLM", "llama.cpp"]
    assert "SGLang wants q_proj" in facts.note
    assert "TGI and LoRAX leave out" in facts.note


def test_variants_and_starts_that_change_the_base_are_for_peft_alone(tmp_path):
    assert inspect_adapter(plain(tmp_path / "dora", use_dora=True)).served_by == ["PEFT"]
    facts = inspect_adapter(plain(tmp_path / "pissa", init_lora_weights="pissa"))
    assert facts.served_by == ["PEFT"]
    assert "--to merged" in facts.note


def test_it_needs_no_torch(native):
    code = (
        "import sys, types; package = types.ModuleType('dynlora'); package.__path__ = [sys.argv[1]];"
        "sys.modules['dynlora'] = package; sys.modules['torch'] = None;"
        "from dynlora.report.inspection import inspect_adapter;"
        "print(inspect_adapter(sys.argv[2]).kind)"
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
    with pytest.raises(ValueError, match="adapter_config.json holds a list, not an object"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for damaged in (content[:-20], content[:40], b"", b"\xff" * 64):
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            inspect_adapter(tmp_path)
