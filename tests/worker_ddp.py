"""One of two processes that train the small net together; run by test_distributed.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dynlora import RankAllocator
from small_net import adamw, adapted, data


def main(folder, inside):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = adapted(target_r=1, dem_weight=0.2)
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    allocator = RankAllocator(model if inside else ddp, optimizer, total_steps=30)
    x, y = data()
    mine = slice(rank * 16, rank * 16 + 16)
    losses = []
    for _ in range(30):
        loss = ((ddp(x[mine]) - y[mine]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        both = loss.detach().clone()
        dist.all_reduce(both)
        losses.append(both.item() / 2)
    num_stored = sum(m.num_components for m in allocator.layers)
    ranks = allocator.finalize_()
    weights = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    torch.save({"losses": losses, "ranks": ranks, "weights": weights, "stored": num_stored},
               f"{folder}/{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], inside=sys.argv[2] == "inside")
