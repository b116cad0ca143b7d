"""README's Python runs as printed and does what it says; links and names in the docs are right."""

import dataclasses
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from doc_fences import PAGES, ROOT, fences, text_of
from dynlora import DynLoraCallback
from dynlora.allocation import Settings

README = text_of("README.md")
ONE_ARGUMENT, AUTO, LOOP = fences("README.md", "python")
MAX_LINES = 150


def tiny_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, intermediate_size=40, **sizes))


def rows(count=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def arguments():
    return TrainingArguments(
        "runs", max_steps=12, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip


def adapter_parameters(model):
    return sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)


def test_the_first_screen_leaves_a_plain_lora_of_half_the_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"base": tiny_bert(), "args": arguments(), "data": rows()}
    ONE_ARGUMENT.run(names)
    assert type(names["model"].peft_config["default"]) is LoraConfig
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    at_8 = get_peft_model(tiny_bert(), LoraConfig(r=8, target_modules="all-linear"))
    assert adapter_parameters(names["model"]) <= adapter_parameters(at_8)


def test_auto_ends_at_the_loss_that_it_accepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    names = {"model": get_peft_model(tiny_bert(), config), "args": arguments(), "data": rows()}
    names |= {"held_out": rows(8), "Trainer": Trainer, "DynLoraCallback": DynLoraCallback}
    AUTO.run(names)
    names["trainer"].train()
    found = names["callback"].history[-1]["auto"]
    accepted = [loss for budget, loss in found["tried"] if budget == found["budget"]]
    assert all(loss <= found["limit"] == found["reference"] * 1.02 for loss in accepted)
    assert adapter_parameters(names["model"]) <= found["budget"]


def test_the_loop_shrinks():
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(tiny_bert(), config)
    before = adapter_parameters(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    LOOP.run({"model": model, "optimizer": optimizer, "loader": DataLoader(rows(), batch_size=2)})
    assert adapter_parameters(model) <= before / 2


def test_it_is_short():
    assert len(README.splitlines()) <= MAX_LINES


def test_the_table_of_settings_is_complete_and_right():
    section = text_of("docs/budget.md").split("## All settings")[1]
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    defaults = Settings(target_r=8)
    assert set(told) == {field.name for field in dataclasses.fields(Settings)}
    for name, value in told.items():
        if name != "target_r":
            assert value.strip() == str(getattr(defaults, name)), name


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    """Anchors are checked by ``make docs``."""
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_test_that_the_docs_name_exists():
    paths = [p for folder in ("tests", "lab/tests") for p in (ROOT / folder).rglob("*.py")]
    everything = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    files = {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("*.py")}
    pages = [text_of(p) for p in PAGES if p.startswith("docs/") and "peft-suite" not in p]
    named = {name for text in pages for name in re.findall(r"`(test_\w+?)(?:_?…|`)", text)}
    assert len(named) > 30
    for name in sorted(named):
        assert f"def {name}" in everything or f"{name}.py" in files, name
    for text in pages:
        for path in re.findall(r"`([\w/]*test_\w+\.py)`", text):
            assert path in files or f"tests/{path}" in map(str, paths) or (ROOT / path).exists(), (
                path
            )
