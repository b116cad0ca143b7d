"""TRL's GRPOTrainer, or RLOOTrainer: answers that a rule checks.

python examples/trl_grpo.py --model Qwen/Qwen3-0.6B --data questions/ --method grpo
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dynlora import DynLoraCallback

METHODS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def has_answer(completions: list[str], answer: list[str], **_columns: object) -> list[float]:
    """1 where the right answer stands in the completion, else 0."""
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def main() -> None:
    """Reinforce on rows of ``prompt`` and ``answer``; write a plain LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", required=True, help="hub id, or a folder of files")
    parser.add_argument("--output", default="out")
    parser.add_argument("--method", choices=METHODS, default="grpo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=256, help="length of a completion")
    options = parser.parse_args()

    trainer_class, config_class = METHODS[options.method]
    callback = DynLoraCallback(target_r=8)
    trainer = trainer_class(
        options.model,
        reward_funcs=has_answer,
        args=config_class(
            options.output, max_steps=options.steps, max_completion_length=options.tokens,
            learning_rate=1e-5, report_to="none", bf16=torch.cuda.is_bf16_supported(),
        ),
        train_dataset=load_dataset(options.data, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    print(callback.ranks)


if __name__ == "__main__":
    main()
