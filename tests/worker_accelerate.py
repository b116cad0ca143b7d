"""One of two processes under ``accelerate launch``; run by test_distributed.py.

``worker_accelerate.py KIND FOLDER`` trains with transformers' Trainer or a plain Accelerate loop.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from dynlora import DynLoraCallback, DynLoraConfig, RankAllocator, export_lora
from small_net import adamw, adapted, data
from worker_kill import CONFIG, WithLoss

STEPS = 20


def trainer_run(folder, batch, **options):
    torch.manual_seed(0)
    model = get_peft_model(WithLoss(dropout=0.0), DynLoraConfig(**CONFIG))
    x, y = data(rows=64)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=1e-2,
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, dataloader_pin_memory=False, label_names=["labels"], **options,
    )  # fmt: skip
    callback = DynLoraCallback()
    run = Trainer(
        model=model, args=arguments, callbacks=[callback],
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
    )  # fmt: skip
    run.train()
    export_lora(run.model, folder / "exported")
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    return losses, callback.ranks, run.accelerator, callback.allocator


def loop_run(folder, batch):
    accelerator = Accelerator(cpu=True)
    model = adapted(**CONFIG)
    loader = DataLoader(TensorDataset(*data(rows=64)), batch)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS)
    losses = []
    while allocator.step < STEPS:
        for x, y in loader:
            if allocator.step == STEPS:
                break
            with accelerator.accumulate(model):
                loss = ((model(x) - y) ** 2).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    ranks = allocator.finalize_()
    export_lora(accelerator.unwrap_model(model), folder / "exported")
    return losses, ranks, accelerator, allocator


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    options = {}
    if kind.startswith("zero"):
        options = {"deepspeed": {
            "zero_optimization": {"stage": int(kind[-1])}, "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1,
        }}  # fmt: skip
    run = loop_run if kind == "loop" else trainer_run
    losses, ranks, accelerator, allocator = run(folder, 8, **options)
    kind = type(allocator.optimizer).__name__
    content = {"losses": losses, "ranks": ranks, "optimizer": kind}
    torch.save(content, folder / f"{accelerator.process_index}.pt")
    accelerator.end_training()
