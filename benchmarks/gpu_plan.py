"""The cases of the GPU check in the order of their worth, and their record.

Promises come first, because they take seconds; then what no run has measured yet, if anything; then what
has results, the oldest first. Seconds are what an H100 took.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_promises as promises
import torch
from cases import LLAMA_1B, LLAMA_8B, ROBERTA
from gpu_arms import GpuCase, gpu_case, tiny
from gpu_costs import Costs
from gpu_timing import Clock, synchronize

HERE = Path(__file__).parent
PACKAGES = ("dynlora", "torch", "transformers", "peft", "accelerate", "triton")
UNUSABLE = 3  # exit code of a worker that leaves the other cases to the next

# sizes at which the device is what limits, not the host's Python; RoBERTa has 512 positions at most
SIZES: dict[str, tuple[Any, ...]] = {
    "1b": (LLAMA_1B, {"layers": 4, "batch": 32, "length": 1024}),
    "8b": (LLAMA_8B, {"layers": 3, "batch": 16, "length": 1024}),
    "roberta": (ROBERTA, {"layers": 12, "batch": 64, "length": 256}),
}
SMALL = {"batch": 4, "length": 512}  # where the host limits


@dataclass(frozen=True)
class Planned:
    """One case.

    Attributes:
        section: the file that holds its result.
        name: its key there.
        seconds: what it is expected to take on one large GPU; it is left out if less is left.
        run: does it.
    """

    section: str
    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


def plan(costs: Costs, *, rehearse: bool) -> list[Planned]:
    """All cases in the order of their worth."""

    def sized(name: str, rank: int = 16, **choice: Any) -> GpuCase:
        shape, size = SIZES[name]
        case = gpu_case(shape, rank=rank, **(size | choice))
        return tiny(case) if rehearse else case

    def steps(seconds: float, case: GpuCase) -> Planned:
        return Planned("steps", case.name, seconds, lambda: costs.step_cost(case))

    def gain(seconds: float, case: GpuCase, *, checkpointing: bool) -> Planned:
        name = case.name + (", gradient checkpointing" if checkpointing else "")
        run = lambda: costs.rank_0(case, checkpointing=checkpointing)  # noqa: E731
        return Planned("gain", name, seconds, run)

    def share(seconds: float, case: GpuCase) -> Planned:
        return Planned("allocator", case.name, seconds, lambda: costs.allocator_share(case))

    def compiled(seconds: float, case: GpuCase) -> Planned:
        return Planned("compiled", case.name, seconds, lambda: costs.compiled(case))

    def quantised(seconds: float, case: GpuCase) -> Planned:
        return Planned("quantised", case.name, seconds, lambda: costs.quantised(case))

    return [
        *_promises(costs.device),
        # all have results of an H100; the oldest come first
        quantised(11, sized("1b")),
        *_graphs(costs.device),
        share(20, sized("1b", autocast=True)),
        steps(32, sized("8b", autocast=True)),
        steps(39, sized("1b", dropout=0.1, autocast=True)),
        steps(32, sized("1b")),
        steps(37, sized("1b", 64, autocast=True)),
        gain(25, sized("1b"), checkpointing=True),
        steps(28, sized("roberta", 8, dropout=0.1, autocast=True)),
        steps(13, sized("1b", autocast=True, **SMALL)),
        steps(25, sized("roberta", 8, autocast=True)),
        *([] if rehearse else [compiled(60, sized("1b", layers=1))]),
        compiled(45, sized("1b", layers=1, autocast=True)),
        steps(32, sized("8b")),
        gain(20, sized("8b"), checkpointing=False),
        share(17, sized("8b")),
        steps(35, sized("8b", 64, autocast=True)),
        steps(36, sized("1b", autocast=True)),
        gain(20, sized("1b"), checkpointing=False),
    ]


def _promises(device: str) -> list[Planned]:
    asked: list[tuple[str, float, Callable[[], dict[str, Any]]]] = [
        ("NaN in a gradient", 3, lambda: promises.nan_in_a_gradient(device)),
        ("NaN under a Trainer", 1, lambda: promises.nan_under_a_trainer(device)),
        ("bit equality", 1, lambda: promises.bit_equality(device)),
        ("GradScaler", 3, lambda: promises.grad_scaler_fp16(device)),
        ("GradScaler, fused AdamW", 2, lambda: promises.grad_scaler_fp16(device, fused=True)),
        ("fused AdamW", 1, lambda: promises.other_adamw(device, fused=True)),
        ("foreach AdamW", 1, lambda: promises.other_adamw(device, foreach=True)),
        ("split over devices", 1, lambda: promises.split_over_devices(device)),
        ("target_r='auto'", 1, lambda: promises.budget_by_loss(device)),
    ]
    return [Planned("promises", *one) for one in asked]


def _graphs(device: str) -> list[Planned]:
    """Last of what is asked about promises: a capture that fails can leave the device unusable."""
    asked: list[tuple[str, float, Callable[[], dict[str, Any]]]] = [
        ("graph of a step, stock LoRA", 3, lambda: promises.graph_of_stock_lora(device)),
        ("graph of gradients, allocator", 1, lambda: promises.graph_of_gradients(device)),
        ("graph of a step, allocator", 1, lambda: promises.graph_with_allocator(device)),
    ]
    return [Planned("promises", *one) for one in asked]


def attempt(work: Callable[[], Any]) -> dict[str, Any]:
    """Do one case, or one arm of one; what it raises is its result, and the check goes on."""
    try:
        return {"value": work()}
    except Exception:  # the record must tell of any failure, and cost no other case
        return {"error": traceback.format_exc()}


class Record:
    """The JSON files of a check, one a section, each renewed whenever one of its cases begins or ends.

    Args:
        folder: where they lie; what it holds already stays.
        provenance: what stands at the head of each.
    """

    def __init__(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.provenance = provenance
        self.sections: dict[str, dict[str, Any]] = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))["cases"]
            for path in sorted(folder.glob("*.json"))
        }

    def __contains__(self, planned: Planned) -> bool:
        """Whether the case was begun."""
        return planned.name in self.sections.get(planned.section, {})

    def add(self, planned: Planned, result: dict[str, Any]) -> None:
        """Note one result; the section's file is whole before and after."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cases = self.sections.setdefault(planned.section, {})
        cases[planned.name] = result
        path = self.folder / f"{planned.section}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.provenance | {"cases": cases}, indent=1) + "\n")
        draft.replace(path)


def check(cases: list[Planned], record: Record, clock: Clock, device: str) -> bool:
    """Run the cases that the time allows and that are not in the record yet.

    Returns:
        Whether the device is still usable; if not, the cases after the one that broke it are not begun.
    """
    for planned in cases:
        if planned in record:
            continue
        if clock.left < planned.seconds:
            record.add(planned, {"left_out": f"{clock.left:.0f} s left of {planned.seconds:.0f}"})
            continue
        record.add(planned, {"error": "the process ended while this case ran"})
        began = time.monotonic()
        done = attempt(planned.run)
        took = {"seconds": round(time.monotonic() - began, 2)}
        result = done["value"] | took if "value" in done else done | took
        cleaned = attempt(lambda: _clean(device))
        if "error" in cleaned:
            result["device_unusable_afterwards"] = cleaned["error"].strip().splitlines()[-1]
        record.add(planned, result)
        state = "failed" if "error" in done else "done"
        line = f"{planned.section}: {planned.name}: {state} in {took['seconds']} s"
        print(line, f"({clock.left:.0f} s left)", flush=True)
        if "error" in cleaned:
            return False
    return True


def _clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()


def table(record: Record) -> str:
    """The ratios of all timed arms, and what else came out, in one line a case."""
    lines = []
    for section, cases in record.sections.items():
        for name, result in cases.items():
            if "arms" in result:
                lines += ["", f"{section}: {name}"]
                lines += [_line(arm, row) for arm, row in result["arms"].items()]
                lines += [
                    f"  {arm}: {error.strip().splitlines()[-1][:300]}"
                    for arm, error in result.get("failed", {}).items()
                ]
            else:
                shown = result.get("error", json.dumps(result)).strip().splitlines()[-1]
                lines += ["", f"{section}: {name}: {shown[:1500]}"]
    return "\n".join(lines)


def _line(arm: str, row: dict[str, Any]) -> str:
    peak = row.get("step_peak_bytes")
    gib = "" if peak is None else f"{peak / 2**30:7.3f} GiB"
    times = f"{row['ms']:9.3f} ms  host {row['host_ms']:8.3f} ms"
    ratio = f"x{row.get('ratio', float('nan')):.3f} {row.get('spread', '')}"
    return f"  {arm:<42}{times}  {ratio} {gib}  of {row['peer']}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What a number is worth nothing without."""
    commit = options.commit
    if commit is None:
        asked = ["git", "rev-parse", "HEAD"]
        ran = subprocess.run(asked, cwd=HERE, capture_output=True, text=True, check=False)
        commit = ran.stdout.strip() or None
    machine = {"processor": platform.processor(), "cores": os.cpu_count(), "device": "cpu"}
    if device == "cuda":
        has = torch.cuda.get_device_properties(0)
        machine |= {
            "device": has.name,
            "memory_bytes": has.total_memory,
            "cuda": torch.version.cuda,
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": shlex.join(["python", "benchmarks/gpu_check.py", *options.words]),
        "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "machine": machine,
        "threads": torch.get_num_threads(),
        "is_rehearsal": options.rehearse,
    }


def work(options: argparse.Namespace, end: float) -> int:
    """Run what the record does not hold yet.

    Returns:
        The exit code: 0, or UNUSABLE where the rest needs another process.
    """
    device = "cpu" if options.rehearse else "cuda"
    clock = Clock(end)
    effort = {"rounds": 2, "steps": 1} if options.rehearse else {"rounds": 9, "steps": 2}
    costs = Costs(device, clock, attempt, **effort)
    cases = plan(costs, rehearse=options.rehearse)
    chosen = [c for c in cases if options.only in f"{c.section}: {c.name}"]
    record = Record(options.out, provenance(options, device))
    if not check(chosen, record, clock, device):
        return UNUSABLE
    print(table(record), flush=True)
    return 0
