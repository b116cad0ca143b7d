"""A loop of one's own with Accelerate: accumulation, a schedule, and nothing to call in the loop.

accelerate launch examples/accelerate_loop.py --model FacebookAI/roberta-base --data SetFit/sst2
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from dynlora import RankAllocator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="FacebookAI/roberta-base")
parser.add_argument("--data", default="SetFit/sst2", help="hub id, or a folder of files")
parser.add_argument("--output", default="out")
parser.add_argument("--epochs", type=int, default=3)
options = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(options.model)
data = load_dataset(options.data, split="train").rename_column("label", "labels")
data = data.map(lambda r: tokenizer(r["text"])).select_columns(["input_ids", "labels"])
loader = DataLoader(data, 8, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
base = AutoModelForSequenceClassification.from_pretrained(options.model)
targets = ["query", "value"]
config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

steps_per_epoch = -(-len(loader) // accelerator.gradient_accumulation_steps)
steps = options.epochs * steps_per_epoch
scheduler = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
allocator = RankAllocator(model, optimizer, total_steps=steps, target_r=4)
for _ in range(options.epochs):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()

allocator.finalize_()
accelerator.unwrap_model(model).save_pretrained(
    options.output, is_main_process=accelerator.is_main_process
)
