"""Two processes on the CPU: the same ranks on both, and the run of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from small_net import attached, data, small_net, train

HERE = Path(__file__).parent


def launch(worker, folder, *arguments):
    """Run the worker twice, joined through a file store, and read what they saved."""
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    environment["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / worker, folder, *arguments], env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [w.returncode for w in workers] == [0, 0], "\n".join(errors)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("given", ["inside", "wrapper"])
def test_ddp_compacts_and_equals_one_process(tmp_path, given):
    one, two = launch("worker_ddp.py", tmp_path, given)
    assert one["ranks"] == two["ranks"]
    assert one["losses"] == two["losses"]
    assert one["stored"] == sum(one["ranks"].values()) == 3  # really shrunk, not only masked
    assert all(torch.equal(one["weights"][n], two["weights"][n]) for n in one["weights"])
    model, optimizer, allocator = attached(total_steps=30, target_r=1, dem_weight=0.2)
    expected = train(model, optimizer, 30)
    torch.testing.assert_close(one["losses"], expected, rtol=1e-5, atol=1e-6)
    assert allocator.ranks() == one["ranks"]


def test_fsdp2_masks_and_exports_what_one_process_trains(tmp_path):
    one, two = launch("worker_fsdp.py", tmp_path)
    assert one["ranks"] == two["ranks"]
    assert one["losses"] == two["losses"]
    assert sum(one["ranks"].values()) == 3
    model, optimizer, allocator = attached(total_steps=30, target_r=1, dem_weight=0.2)
    expected = train(model, optimizer, 30)
    torch.testing.assert_close(one["losses"], expected, rtol=1e-5, atol=1e-6)
    assert allocator.ranks() == one["ranks"]
    assert not (tmp_path / "exported1").exists()  # only the first process writes
    loaded = PeftModel.from_pretrained(small_net(), tmp_path / "exported0")
    torch.testing.assert_close(loaded(data()[0]), one["logits"], rtol=0, atol=1e-5)
