"""transformers.Trainer: a text classifier whose ranks go where the task needs them.

python examples/trainer_classification.py --model FacebookAI/roberta-base --data SetFit/sst2
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
    """Fine-tune on rows of ``text`` and ``label``; write a plain LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--data", default="SetFit/sst2", help="hub id, or a folder of files")
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    data = load_dataset(options.data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
    base = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(set(data["label"]))
    )

    targets = ["query", "value"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        report_to="none",
    )
    callback = DynLoraCallback(target_r=4)
    trainer = Trainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    trainer.save_model()
    print(callback.ranks)


if __name__ == "__main__":
    main()
