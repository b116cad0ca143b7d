"""The trainer of sentence-transformers: an embedding model at the size of a LoRA of rank 4.

python examples/sentence_embeddings.py --data sentence-transformers/all-nli
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

from dynlora import DynLoraCallback


def main() -> None:
    """Fine-tune on rows of ``anchor`` and ``positive``; write a plain LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="sentence-transformers/all-nli", help="hub id or folder")
    parser.add_argument("--subset", default=None, help="such as pair, for the default data")
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()

    model = SentenceTransformer(options.model)
    targets = ["query", "value", "dense"]
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            options.output, max_steps=options.steps, learning_rate=1e-3, report_to="none"
        ),
        train_dataset=load_dataset(options.data, options.subset, split="train"),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[DynLoraCallback(target_r=4)],
    )
    trainer.train()
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
