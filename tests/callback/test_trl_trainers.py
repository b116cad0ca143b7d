"""TRL's trainers with the user's own LoraConfig."""

import pytest
import torch
import trl  # loads a trainer when it is asked for
from datasets import Dataset
from peft import LoraConfig, PeftModel, PeftType
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dynlora import DynLoraCallback
from tiny_classifier import tiny_tokenizer
from tiny_models import adapted, config, logits, tiny_llama, train

pytestmark = pytest.mark.slow  # in the quick set examples/trl_sft.py stands for TRL

ARGUMENTS = {
    "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
}  # fmt: skip


def tokenizer():
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{i}" for i in range(30))]
    model = WordLevel({word: i for i, word in enumerate(words)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


@pytest.mark.parametrize("gated", [False, True])
def test_sft_trainer_ends_with_a_plain_lora_of_the_budget(tmp_path, gated):
    callback = DynLoraCallback() if gated else DynLoraCallback(1, prune_interval=2)
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(output_dir=str(tmp_path / "run"), **ARGUMENTS),
        train_dataset=Dataset.from_list([{"text": f"w{i % 30}"} for i in range(24)]),
        processing_class=tokenizer(),
        peft_config=config(task_type="CAUSAL_LM", gated=gated),
        callbacks=[callback],
    )
    assert trainer.model.peft_type == ("DYNLORA" if gated else PeftType.LORA)
    trainer.train()
    assert callback.allocator.cost <= callback.allocator.target_cost
    assert 0 in callback.ranks.values()
    assert type(trainer.model.peft_config["default"]) is LoraConfig
    trainer.save_model(str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # TRL's
def test_dpo_of_an_adapted_model_trains_one_copy_and_keeps_the_other_as_reference(tmp_path):
    """Given a PeftModel, TRL copies its adapter into a frozen "ref"."""
    model = adapted(task_type="CAUSAL_LM")
    train(model, steps=5, total_steps=50)
    start = logits(model)
    words = tiny_tokenizer()
    words.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    callback = DynLoraCallback(1, adapter="default", prune_interval=2)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_list(
            [{"prompt": "a film", "chosen": " good", "rejected": " bad"}] * 24
        ),
        processing_class=words,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.allocator.cost <= callback.allocator.target_cost
    assert 0 in callback.ranks.values()
    assert (logits(model) - start).abs().max() > 1e-3
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-5)
