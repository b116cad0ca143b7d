"""One of two processes that train a sharded small net; run by test_distributed.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dynlora import RankAllocator, export_lora
from small_net import adamw, adapted, data


def main(folder):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = adapted(target_r=1, dem_weight=0.2)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model, foreach=False)
    allocator = RankAllocator(model, optimizer, total_steps=30)
    x, y = data()
    mine = slice(rank * 16, rank * 16 + 16)
    losses = []
    for _ in range(30):
        loss = ((model(x[mine]) - y[mine]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        both = loss.detach().clone()
        dist.all_reduce(both)
        losses.append(both.item() / 2)
    logits = model(x).detach()
    ranks = allocator.ranks()
    export_lora(model, f"{folder}/exported{rank}")
    torch.save({"losses": losses, "ranks": ranks, "logits": logits}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
