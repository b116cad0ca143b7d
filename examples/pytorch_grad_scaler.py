"""Plain PyTorch in half precision: steps that the GradScaler skips do not count.

python examples/pytorch_grad_scaler.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora import RankAllocator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="openai-community/gpt2")
parser.add_argument("--data", default="roneneldan/TinyStories", help="hub id, or a folder of files")
parser.add_argument("--output", default="out")
parser.add_argument("--steps", type=int, default=1000)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = load_dataset(options.data, split="train")["text"]


def collate(rows: list[str]) -> dict[str, torch.Tensor]:
    """Token ids, padded; padding is no label."""
    batch = tokenizer(rows, padding=True, truncation=True, max_length=256, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch.to(device)


base = AutoModelForCausalLM.from_pretrained(options.model).to(device)
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
scaler = torch.amp.GradScaler(device)
allocator = RankAllocator(model, optimizer, total_steps=options.steps, target_r=8)
model.train()
while allocator.step < options.steps:
    for batch in DataLoader(texts, batch_size=8, shuffle=True, collate_fn=collate):
        with torch.autocast(device, dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if allocator.step == options.steps:
            break

allocator.finalize_()
model.save_pretrained(options.output)
