"""TRL's SFTTrainer: one argument beside a LoRA script.

python examples/trl_sft.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from dynlora import DynLoraCallback


def main() -> None:
    """Fine-tune on rows of ``text`` or ``messages``; write a plain LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", default="trl-lib/Capybara", help="hub id, or a folder of files")
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()

    bf16 = torch.cuda.is_bf16_supported()
    callback = DynLoraCallback(target_r=8)
    trainer = SFTTrainer(
        options.model,
        SFTConfig(
            options.output, max_steps=options.steps, learning_rate=2e-4, report_to="none", bf16=bf16
        ),
        train_dataset=load_dataset(options.data, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model()
    print(callback.ranks)


if __name__ == "__main__":
    main()
