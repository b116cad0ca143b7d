"""accelerate's own checkpoints: save_state and load_state."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from small_net import adamw, adapted, allocated, data

STEPS = 30  # the window is 4 to 15; six batches an epoch
FIELDS = {"target_r": 0.5, "prune_interval": 3}  # modules end at rank 0


def prepared(seed, gated):
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = adapted(seed=seed, gated=gated, **FIELDS)
    loader = DataLoader(TensorDataset(*data(rows=48)), 8)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    allocator = allocated(model, optimizer, total_steps=STEPS, gated=gated, **FIELDS)
    accelerator.register_for_checkpointing(allocator)
    return accelerator, model, optimizer, loader, allocator


def trained(accelerator, model, optimizer, loader, allocator, save_at=None, folder=None):
    losses = []
    while allocator.step < STEPS:
        batches = accelerator.skip_first_batches(loader, allocator.step % len(loader))
        for x, y in batches:
            loss = ((model(x) - y) ** 2).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if allocator.step == save_at:
                accelerator.save_state(folder)
    return losses


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("stop_at", [2, 9, 15, 24])
def test_a_run_goes_on_bit_for_bit_from_save_state(tmp_path, stop_at, gated):
    first = prepared(0, gated)
    expected = trained(*first, save_at=stop_at, folder=tmp_path)
    second = prepared(7, gated)
    second[0].load_state(tmp_path)
    assert second[-1].step == stop_at
    assert trained(*second) == expected[stop_at:]
    assert 0 in second[-1].ranks().values()
    assert second[-1].finalize_() == first[-1].finalize_()
    whole, parts = first[1].state_dict(), second[1].state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
