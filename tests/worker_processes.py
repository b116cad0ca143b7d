"""One of two processes that train the small net together; run by test_distributed.py.

``torchrun --nproc-per-node 2 worker_processes.py MODE FOLDER IMPORTANCE`` saves what each process saw.
"""

import os
import sys

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from dynlora import RankAllocator, export_lora
from small_net import adamw, adapted, data

STEPS = 30


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model, policy=None, **options):
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"),
        **{"use_orig_params": True, **options},
    )  # fmt: skip


def fsdp1_layers(model):
    return fsdp1(model, ModuleWrapPolicy({LoraLayer}))


def fsdp1_flat(model):
    return fsdp1(model.requires_grad_(True), use_orig_params=False)


WRAPPERS = {
    "ddp": ddp, "ddp-inside": ddp, "fsdp2": fsdp2, "fsdp1": fsdp1, "fsdp1-layers": fsdp1_layers,
    "fsdp1-flat": fsdp1_flat,
}  # fmt: skip


def zero(model, stage):
    import deepspeed

    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=adamw(model), dist_init_required=False,
        config={"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": stage},
                "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0},
    )  # fmt: skip
    return engine, optimizer


def trained(mode, model, spoil=None):
    """Train on this process's half of each batch; (allocator, wrapped model, mean losses)."""
    rank = dist.get_rank()
    if mode.startswith("zero"):
        wrapped, optimizer = zero(model, int(mode[-1]))
    else:
        wrapped = WRAPPERS[mode](model)
        optimizer = adamw(wrapped, foreach=False)
    allocator = RankAllocator(
        model if mode == "ddp-inside" else wrapped, optimizer, total_steps=STEPS
    )
    x, y = data()
    mine = slice(rank * 16, rank * 16 + 16)
    losses = []
    for step in range(STEPS):
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
    return allocator, wrapped, losses


def main(mode, folder, importance="share", spoil=None):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo")
    model = adapted(target_r=1, dem_weight=0.2, importance=importance)
    try:
        allocator, wrapped, losses = trained(mode, model, spoil and int(spoil))
    except (FloatingPointError, ValueError) as error:
        torch.save(f"{type(error).__name__}: {error}", f"{folder}/{dist.get_rank()}.pt")
        dist.barrier()
        return
    stored = sum(m.num_components for m in allocator.layers)
    ranks = allocator.ranks()
    logits = wrapped(data()[0]).detach()
    export_lora(wrapped, f"{folder}/exported{dist.get_rank()}")
    content = {"losses": losses, "ranks": ranks, "logits": logits, "stored": stored}
    if mode.startswith("ddp"):
        allocator.finalize_()
        content["weights"] = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    torch.save(content, f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
