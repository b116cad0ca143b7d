"""Two processes on the CPU: the same ranks on both, and the run of one process on the whole batch.

Started as users start them, by torchrun and ``accelerate launch``. What each mode does stands in
docs/processes.md.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import PeftModel

import worker_accelerate
from small_net import attached, data, small_net, train
from small_trainer import WithLoss

WORKERS = Path(__file__).parents[1] / "helpers"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip
RTOL = 1e-6  # other order of summation over the batch; measured: 2e-7
POOR = {"target_r": 0.5, "dem_weight": 0.2}  # modules end at rank 0

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed (make test-zero)"
)

needs_streams = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8") and not torch.cuda.is_available(),
    reason="FSDP2 of torch 2.7 asks a CPU's stream for events",
)


def launch(launcher, worker, *arguments, folder):
    """Run the worker in two processes and read what they saved in ``folder``."""
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    port = [] if launcher is TORCHRUN else ["--main_process_port", str(20000 + os.getpid() % 20000)]
    command = [sys.executable, "-m", *launcher, *port, WORKERS / worker, arguments[0], folder]
    done = subprocess.run(
        [*command, *arguments[1:]], env={**os.environ, **own}, capture_output=True, text=True,
        check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def single_process(**fields):
    model, optimizer, allocator = attached(total_steps=30, **fields)
    return train(model, optimizer, 30), allocator


@pytest.mark.slow
def test_until_the_first_cut_ddp_is_ddp_without_an_allocator_bit_for_bit(tmp_path):
    launch(TORCHRUN, "worker_processes.py", "first-steps", folder=tmp_path)
    for rank in range(2):
        ours, theirs = (
            torch.load(tmp_path / f"{mode}{rank}.pt") for mode in ("ddp", "ddp-without")
        )
        assert ours[0] == theirs[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


DDP = [
    ("ddp-inside", {}),
    ("ddp", {}),
    ("ddp", {"gated": True, "importance": "share"}),
    ("ddp-inside", {"compact": False}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "fields"), DDP, ids=str)
def test_ddp_compacts_and_equals_one_process(tmp_path, mode, fields):
    fields = {**POOR, **fields}
    one, two = launch(TORCHRUN, "worker_processes.py", mode, json.dumps(fields), folder=tmp_path)
    assert one["ranks"] == two["ranks"]
    assert 0 in one["ranks"].values()
    assert one["losses"] == two["losses"]
    is_compact = fields.get("compact", True)
    assert one["stored"] == (list(one["ranks"].values()) if is_compact else [4, 4, 4])
    assert all(torch.equal(one["weights"][n], two["weights"][n]) for n in one["weights"])
    expected, allocator = single_process(**fields)
    torch.testing.assert_close(one["losses"], expected, rtol=RTOL, atol=0)
    assert allocator.ranks() == one["ranks"]


SHARDED = [
    pytest.param(mode, {"importance": importance}, marks=[pytest.mark.slow, mark])
    for mode, mark in (
        ("fsdp2", needs_streams), *((f"zero{n}", needs_deepspeed) for n in (1, 2, 3))
    )
    for importance in ("share", "sensitivity")
]  # fmt: skip


@pytest.mark.parametrize(("mode", "fields"), SHARDED, ids=str)
def test_sharded_runs_mask_and_export_what_one_process_trains(tmp_path, mode, fields):
    fields = {**POOR, **fields}
    one, two = launch(TORCHRUN, "worker_processes.py", mode, json.dumps(fields), folder=tmp_path)
    assert one["ranks"] == two["ranks"]
    assert 0 in one["ranks"].values()
    assert one["losses"] == two["losses"]
    assert one["stored"] == [4, 4, 4]  # shapes are kept, the dead are masked
    expected, allocator = single_process(**fields)
    torch.testing.assert_close(one["losses"], expected, rtol=RTOL, atol=0)
    assert allocator.ranks() == one["ranks"]
    assert not (tmp_path / "exported1").exists()  # only the first process writes
    loaded = PeftModel.from_pretrained(small_net(), tmp_path / "exported0")
    torch.testing.assert_close(loaded(data()[0]), one["logits"], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=needs_streams)])
def test_a_gradient_that_is_bad_on_one_process_stops_both(tmp_path, mode):
    for message in launch(
        TORCHRUN, "worker_processes.py", mode, json.dumps(POOR), "7", folder=tmp_path
    ):
        assert message.startswith("NotFiniteError: NaN or infinite gradient at step 8 in ")


LAUNCHED = [
    ("loop", "AdamW"),
    ("trainer", "AdamW"),
    pytest.param("zero2", "DeepSpeedZeroOptimizer", marks=needs_deepspeed),
    pytest.param("zero3", "DeepSpeedZeroOptimizer_Stage3", marks=needs_deepspeed),
]


@pytest.mark.slow
def test_auto_finds_one_answer_on_the_rows_of_both_processes(tmp_path):
    one, two = launch(ACCELERATE, "worker_accelerate.py", "auto", folder=tmp_path)
    assert one["ranks"] == two["ranks"]
    assert one["losses"] == two["losses"]
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=0)
    (found,), (other,) = ([e["auto"] for e in run["history"]] for run in (one, two))
    assert found == other
    assert found["budget"] < found["by_rank"][-1][1] * 2
    (tmp_path / "one").mkdir()
    losses, _, _, allocator = worker_accelerate.auto_run(tmp_path / "one", 16)
    assert losses == pytest.approx(one["losses"], rel=1e-4)
    alone = allocator.history[0]["auto"]
    assert (found["order"], found["budget"]) == (alone["order"], alone["budget"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), LAUNCHED)
def test_accelerate_launch_trains_what_one_process_trains(tmp_path, kind, optimizer):
    """The Trainer (with DeepSpeed, too) and a plain Accelerate loop."""
    one, two = launch(ACCELERATE, "worker_accelerate.py", kind, folder=tmp_path)
    assert one["optimizer"] == optimizer
    assert one["ranks"] == two["ranks"]
    assert one["losses"] == two["losses"]
    run = worker_accelerate.loop_run if kind == "loop" else worker_accelerate.trainer_run
    expected, ranks, *_ = run(tmp_path / "alone", 16)
    assert ranks == one["ranks"]
    assert 0 in ranks.values()
    torch.testing.assert_close(one["losses"], expected, rtol=RTOL, atol=0)
    base = small_net if kind == "loop" else with_loss
    together, alone = (
        PeftModel.from_pretrained(base(), folder / "exported")
        for folder in (tmp_path, tmp_path / "alone")
    )
    x, y = data()
    inputs = (x,) if kind == "loop" else (x, y)
    torch.testing.assert_close(together(*inputs), alone(*inputs), rtol=1e-5, atol=1e-6)


def with_loss():
    torch.manual_seed(0)
    return WithLoss()
