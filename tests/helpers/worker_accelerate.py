"""One of two processes under ``accelerate launch``; run by allocator/test_distributed.py.

``worker_accelerate.py KIND FOLDER`` trains with transformers' Trainer or a plain Accelerate loop.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from dynlora import DynLoraCallback, export_lora
from small_net import adamw, adapted, allocated, data
from small_trainer import losses_of, model_with, trainer, trainer_of

STEPS = 20
FIELDS = {"target_r": 0.5, "prune_interval": 3}


def trainer_run(folder, batch, **options):
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": batch, **options}
    run, callback = trainer_of(folder, arguments=arguments, **FIELDS)
    run.train()
    export_lora(run.model, folder / "exported")
    return losses_of(run), callback.ranks, run.accelerator, callback.allocator


def auto_run(folder, batch, **options):
    """The held-out rows decide in the middle of the run, by gradients too, and training goes on."""
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": batch, **options}
    callback = DynLoraCallback(target_r="auto", tolerance=0.2, prune_end=0.6)
    model = model_with(r=8, target_r=8)
    run = trainer(folder, model, [callback], **arguments)
    run.train()
    return losses_of(run), callback.ranks, run.accelerator, callback.allocator


def loop_run(folder, batch):
    accelerator = Accelerator(cpu=True)
    model = adapted()
    loader = DataLoader(TensorDataset(*data(rows=64)), batch)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    allocator = allocated(model, optimizer, total_steps=STEPS, **FIELDS)
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
    run = {"loop": loop_run, "auto": auto_run}.get(kind, trainer_run)
    losses, ranks, accelerator, allocator = run(folder, 8, **options)
    kind = type(allocator.optimizer).__name__
    content = {"losses": losses, "ranks": ranks, "optimizer": kind}
    content["history"] = allocator.history
    content["weights"] = {
        m.name: [f.parameter.detach() for f in m.factors] for m in allocator.present
    }
    torch.save(content, folder / f"{accelerator.process_index}.pt")
    accelerator.end_training()
