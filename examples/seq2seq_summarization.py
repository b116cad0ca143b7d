"""Seq2SeqTrainer: a summarizer at the size of a LoRA of rank 8, ranks by module.

python examples/seq2seq_summarization.py --model facebook/bart-base --data EdinburghNLP/xsum
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from dynlora import DynLoraCallback


def main() -> None:
    """Fine-tune on rows of ``document`` and ``summary``; write a plain LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="facebook/bart-base")
    parser.add_argument("--data", default="EdinburghNLP/xsum", help="hub id, or a folder of files")
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset(options.data, split="train")
    data = data.map(
        lambda row: tokenizer(
            row["document"], text_target=row["summary"], truncation=True, max_length=512
        ),
        remove_columns=data.column_names,
    )
    base = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config)
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            options.output, max_steps=options.steps, learning_rate=1e-3, report_to="none"
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        callbacks=[DynLoraCallback(target_r=8)],
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
