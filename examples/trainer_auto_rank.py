"""transformers.Trainer: no rank to choose; the held-out loss says how small the adapter can be.

python examples/trainer_auto_rank.py --model FacebookAI/roberta-base --data SetFit/sst2
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from dynlora import DynLoraCallback


def main() -> None:
    """Fine-tune on rows of ``text`` and ``label``; write the smallest LoRA that is as good."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--data", default="SetFit/sst2", help="hub id, or a folder of files")
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset(options.data, split="train")
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
    data = data.train_test_split(test_size=0.1, seed=0)
    base = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(set(data["train"]["label"]))
    )
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    arguments = TrainingArguments(
        options.output, max_steps=options.steps, learning_rate=1e-3, report_to="none"
    )
    callback = DynLoraCallback(target_r="auto")
    trainer = Trainer(
        get_peft_model(base, config),
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model()
    for rank, parameters, loss in callback.history[-1]["auto"]["by_rank"]:
        print(f"the size of rank {rank}: {parameters} parameters, held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
