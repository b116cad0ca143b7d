"""The README.md that a run leaves: what came out, and code that loads it; nobody else's is touched."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from dynlora import DynLoraCallback
from dynlora.callback.model_card import MARK
from small_trainer import SAVE_ALL, trainer, trainer_of
from tiny_classifier import save_encoder, tiny_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier of three labels, trained and saved; with its folder."""
    place = tmp_path_factory.mktemp("run")
    base = save_encoder(place / "base")
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    tokens = tiny_tokenizer()(["a good film", "a bad film", "a film"] * 8)
    rows = [{"input_ids": ids, "labels": n % 3} for n, ids in enumerate(tokens["input_ids"])]
    arguments = TrainingArguments(
        str(place / "out"), max_steps=8, per_device_train_batch_size=6, learning_rate=1e-2,
        eval_strategy="steps", eval_steps=4, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    run = Trainer(
        get_peft_model(model, config), arguments, train_dataset=rows, eval_dataset=rows[:6],
        processing_class=tiny_tokenizer(), callbacks=[DynLoraCallback(target_r=2)],
    )  # fmt: skip
    run.train()
    run.save_model(str(place / "out"))
    return run, place / "out"


def test_the_card_says_what_came_out_and_keeps_what_peft_adds(trained):
    run, out = trained
    card = (out / "README.md").read_text(encoding="utf-8")
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, DynLoraCallback))
    for name, rank in callback.ranks.items():
        assert f"| {name} | {rank} |" in card
    before, after = callback.allocator.total_cost, callback.allocator.cost
    assert f"of {before:,} parameters {after:,} are left" in card
    loss = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log][-1]
    assert f"| held-out, after step 8 | |\n|---|---|\n| loss | {loss:.4g} |" in card
    assert "library_name: peft" in card
    assert "base_model: " in card
    assert "More Information Needed" not in card  # PEFT's template


def test_the_code_in_the_card_loads_what_was_trained(trained, monkeypatch):
    run, out = trained
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.DOTALL)[1]
    shop = {}
    exec(code.replace("this-folder", str(out)), shop)  # noqa: S102 (what the page prints is run)
    batch = {"input_ids": torch.tensor([[2, 8, 4, 9, 3]])}
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
        torch.testing.assert_close(shop["model"].eval()(**batch).logits, expected)


def test_a_card_of_somebody_else_is_left_alone_and_our_own_is_renewed(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("my thesis", encoding="utf-8")
    trainer(tmp_path).train()
    assert path.read_text(encoding="utf-8") == "my thesis"
    path.write_text(f"old\n{MARK}\n", encoding="utf-8")
    trainer(tmp_path).train()
    assert "A LoRA of WithLoss" in path.read_text(encoding="utf-8")  # no name that loads: no code
    assert "```" not in path.read_text(encoding="utf-8")


def test_a_resumed_run_counts_from_where_it_first_began(tmp_path):
    def card():
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    run, _ = trainer_of(tmp_path, arguments=SAVE_ALL)
    run.train()
    whole = card()
    (tmp_path / "README.md").unlink()
    again, _ = trainer_of(tmp_path, arguments=SAVE_ALL)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))  # after the freeze
    assert card() == whole
