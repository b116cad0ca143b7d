"""One of two processes that train the small net together; run by allocator/test_distributed.py.

``torchrun --nproc-per-node 2 worker_processes.py MODE FOLDER [FIELDS [SPOIL]]`` saves what each saw.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dynlora import export_lora
from small_net import adamw, adapted, allocated, data

STEPS = 30


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = {"ddp": ddp, "ddp-inside": ddp, "ddp-without": ddp, "fsdp2": fsdp2, "fsdp1": fsdp1}


def zero(model, stage):
    import deepspeed

    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=adamw(model), dist_init_required=False,
        config={"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": stage},
                "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0},
    )  # fmt: skip
    return engine, optimizer


def trained(mode, model, spoil=None, steps=STEPS, **fields):
    """Train on this process's half of each batch; (allocator, wrapped model, losses, optimizer)."""
    rank = dist.get_rank()
    if mode.startswith("zero"):
        wrapped, optimizer = zero(model, int(mode[-1]))
    else:
        wrapped = WRAPPERS[mode](model)
        optimizer = adamw(wrapped, foreach=False)
    allocator = None
    if mode != "ddp-without":
        around = model if mode == "ddp-inside" else wrapped
        allocator = allocated(around, optimizer, total_steps=STEPS, **fields)
    x, y = data()
    mine = slice(rank * 16, rank * 16 + 16)
    losses = []
    for step in range(steps):
        loss = ((wrapped(x[mine]) - y[mine]) ** 2).mean()
        if step == spoil and rank == 1:
            loss = loss * float("nan")
        if mode.startswith("zero"):
            wrapped.backward(loss)
            wrapped.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        both = loss.detach().clone()
        dist.all_reduce(both)
        losses.append(both.item() / 2)
    return allocator, wrapped, losses, optimizer


def main(mode, folder, fields="{}", spoil=None):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo")
    fields = json.loads(fields)
    model = adapted(**fields)
    try:
        allocator, wrapped, losses, _ = trained(mode, model, spoil and int(spoil), **fields)
    except (FloatingPointError, ValueError) as error:
        torch.save(f"{type(error).__name__}: {error}", f"{folder}/{dist.get_rank()}.pt")
        dist.barrier()
        return
    content = {
        "losses": losses, "ranks": allocator.ranks(), "stored": [m.rank for m in allocator.modules],
        "logits": wrapped(data()[0]).detach(),
    }  # fmt: skip
    export_lora(wrapped, f"{folder}/exported{dist.get_rank()}")
    if mode.startswith("ddp"):
        allocator.finalize_()
        content["weights"] = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    torch.save(content, f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def first_steps(folder):
    """Thirteen steps of DDP, with an allocator and without, for a comparison to the bit."""
    dist.init_process_group("gloo")
    for mode in ("ddp", "ddp-without"):
        model = adapted()
        _, _, losses, optimizer = trained(mode, model, steps=13, target_r=1)
        state = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        moments = optimizer.state_dict()["state"]
        torch.save((losses, state, moments), f"{folder}/{mode}{dist.get_rank()}.pt")
    torch.save(None, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "first-steps":
        first_steps(sys.argv[2])
    else:
        main(*sys.argv[1:])
