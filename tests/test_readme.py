"""README's Python runs as printed and does what it says; its table and links are right."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from doc_fences import PAGES, ROOT, fences, text_of
from dynlora import DynLoraConfig

README = text_of("README.md")
FENCES = fences("README.md", "python")


def tiny_bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, intermediate_size=32, **sizes))


def rows(count=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def test_the_trainer_fence_and_the_serving_fence_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer_fence, _, warm_fence, serving_fence = FENCES
    arguments = TrainingArguments(
        "runs", max_steps=12, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    names = {"base": tiny_bert(), "args": arguments, "data": rows()}
    trainer_fence.run(names)
    assert type(names["model"].peft_config["default"]) is LoraConfig
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    serve = {"fresh_base": tiny_bert()}
    serving_fence.run(serve)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        expected = names["model"].eval()(input_ids=ids).logits
        actual = serve["merged"].eval()(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    (tmp_path / "my-r64-lora").mkdir()
    config = LoraConfig(r=64, target_modules="all-linear")
    get_peft_model(tiny_bert(), config).save_pretrained(tmp_path / "my-r64-lora")
    start = {"base": tiny_bert()}
    warm_fence.run(start)
    assert isinstance(start["model"].peft_config["default"], DynLoraConfig)


def test_the_loop_fence_runs():
    model = get_peft_model(tiny_bert(), DynLoraConfig(target_r=2, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    names = {"model": model, "optimizer": optimizer, "loader": DataLoader(rows(), batch_size=2)}
    FENCES[1].run(names)
    assert type(model.peft_config["default"]) is LoraConfig


def test_the_defaults_in_the_table_are_the_configs():
    config = DynLoraConfig()
    table = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", README, re.MULTILINE)
    checked = 0
    for names, values in table:
        for name, value in zip(names.split(", "), values.split(", "), strict=True):
            field = name.strip("` ")
            expected = value.strip()
            if expected.startswith("ceil"):
                expected = "12"
            assert str(getattr(config, field)) == expected, field
            checked += 1
    assert checked == 19


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    """Anchors are checked by ``make docs``."""
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_test_that_the_docs_name_exists():
    sources = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")
    }
    everything = "\n".join(sources.values())
    named = set()
    for page in ("method.md", "compatibility.md", "trl.md"):
        named |= set(re.findall(r"`(test_\w+)(?:\.py|…|`)", text_of(f"docs/{page}")))
    assert len(named) > 30
    for name in named:
        assert f"{name}.py" in sources or f"def {name}" in everything, name
