"""TRL's DPOTrainer: preferences; the reference is the model without its adapter.

python examples/trl_dpo.py --model Qwen/Qwen3-0.6B --data trl-lib/ultrafeedback_binarized
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from dynlora import DynLoraCallback


def main() -> None:
    """Fine-tune on rows of ``prompt``, ``chosen`` and ``rejected``; write a plain LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--data", default="trl-lib/ultrafeedback_binarized", help="hub id or folder"
    )
    parser.add_argument("--output", default="out")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()

    bf16 = torch.cuda.is_bf16_supported()
    callback = DynLoraCallback(target_r=8)
    trainer = DPOTrainer(
        options.model,
        args=DPOConfig(
            options.output, max_steps=options.steps, learning_rate=1e-5, report_to="none", bf16=bf16
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
