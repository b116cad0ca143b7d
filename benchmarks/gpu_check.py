"""Does what holds on a CPU hold on a GPU? One prepared run, for whenever a GPU is at hand.

    python benchmarks/gpu_check.py --seconds 520 --out benchmarks/results/gpu
    python benchmarks/gpu_check.py --rehearse --out FOLDER     (tiny shapes on the CPU, a minute)

It needs torch, transformers, peft, accelerate and, if dynlora is not installed, PYTHONPATH=src. Cases run
in the order of their worth; each one's result is in its section's JSON as soon as it ends, so the run may
be killed at any moment. A case that raises leaves its traceback there, and the next one runs.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # imports take their share of the time there is


import gpu_promises as promises  # noqa: E402
import torch  # noqa: E402
from gpu_arms import SHAPES, GpuCase, gpu_case, tiny  # noqa: E402
from gpu_costs import Costs  # noqa: E402
from gpu_timing import Clock, synchronize  # noqa: E402

HERE = Path(__file__).parent
PACKAGES = ("dynlora", "torch", "transformers", "peft", "accelerate", "triton")


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

    def sized(name: str, rank: int, **choice: Any) -> GpuCase:
        shape, layers = SHAPES[name]
        layers = choice.pop("layers", layers)
        case = gpu_case(shape, layers, rank, **choice)
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

    return [
        steps(14, sized("1b", 16, autocast=True)),
        steps(10, sized("1b", 16)),
        gain(9, sized("1b", 16), checkpointing=False),
        share(7, sized("1b", 16, autocast=True)),
        steps(14, sized("8b", 16, autocast=True)),
        *_promises(costs.device),
        steps(10, sized("roberta", 8, autocast=True)),
        steps(12, sized("1b", 16, dropout=0.1, autocast=True)),
        gain(10, sized("1b", 16), checkpointing=True),
        steps(8, sized("1b", 16, batch=2, autocast=True)),
        steps(12, sized("8b", 16)),
        steps(12, sized("1b", 64, autocast=True)),
        compiled(75, sized("1b", 16, layers=1 if rehearse else 2, autocast=True)),
        steps(10, sized("roberta", 8, dropout=0.1, autocast=True)),
        steps(8, sized("roberta", 8)),
        share(7, sized("8b", 16)),
        steps(10, sized("1b", 8)),
        steps(10, sized("1b", 32)),
        steps(10, sized("1b", 64)),
        steps(12, sized("1b", 16, dropout=0.1)),
        steps(8, sized("roberta", 8, batch=2, autocast=True)),
        gain(12, sized("8b", 16, layers=4), checkpointing=False),
        steps(12, sized("8b", 64)),
        *([] if rehearse else [compiled(75, sized("1b", 16, layers=2))]),
        # last: a capture that fails can leave the device's context unusable
        Planned(
            "promises", "graph, allocator", 3, lambda: promises.graph_with_allocator(costs.device)
        ),
    ]


def _promises(device: str) -> list[Planned]:
    return [
        Planned("promises", "NaN in a gradient", 2, lambda: promises.nan_in_a_gradient(device)),
        Planned("promises", "bit equality", 2, lambda: promises.bit_equality(device)),
        Planned("promises", "GradScaler", 2, lambda: promises.grad_scaler_fp16(device)),
        Planned("promises", "fused AdamW", 2, lambda: promises.other_adamw(device, fused=True)),
        Planned("promises", "foreach AdamW", 2, lambda: promises.other_adamw(device, foreach=True)),
        Planned("promises", "split over devices", 2, lambda: promises.split_over_devices(device)),
        Planned("promises", "graph, stock", 3, lambda: promises.graph_of_stock_lora(device)),
    ]


def attempt(work: Callable[[], Any]) -> dict[str, Any]:
    """Do one case, or one arm of one; what it raises is its result, and the check goes on."""
    try:
        return {"value": work()}
    except Exception:  # the record must tell of any failure, and cost no other case
        return {"error": traceback.format_exc()}


class Record:
    """The JSON files of a check, one a section, each renewed whenever one of its cases ends.

    Args:
        folder: where they lie.
        provenance: what stands at the head of each.
    """

    def __init__(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.provenance = provenance
        self.sections: dict[str, dict[str, Any]] = {}

    def add(self, planned: Planned, result: dict[str, Any]) -> None:
        """Note one result; the section's file is whole before and after."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cases = self.sections.setdefault(planned.section, {})
        cases[planned.name] = result
        path = self.folder / f"{planned.section}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.provenance | {"cases": cases}, indent=1) + "\n")
        draft.replace(path)


def check(cases: list[Planned], record: Record, clock: Clock, device: str) -> None:
    """Run the cases that the time allows; those left out are recorded too."""
    for planned in cases:
        if clock.left < planned.seconds:
            record.add(planned, {"left_out": f"{clock.left:.0f} s left of {planned.seconds:.0f}"})
            continue
        began = time.monotonic()
        done = attempt(planned.run)
        took = {"seconds": round(time.monotonic() - began, 2)}
        result = done["value"] | took if "value" in done else done | took
        record.add(planned, result)
        state = "failed" if "error" in done else "done"
        line = f"{planned.section}: {planned.name}: {state} in {took['seconds']} s"
        print(line, f"({clock.left:.0f} s left)", flush=True)
        attempt(lambda: _clean(device))


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
                lines += [f"  {arm}: failed" for arm in result.get("failed", {})]
            else:
                shown = result.get("error", json.dumps(result)).strip().splitlines()[-1]
                lines += ["", f"{section}: {name}: {shown[:600]}"]
    return "\n".join(lines)


def _line(arm: str, row: dict[str, Any]) -> str:
    peak = row.get("step_peak_bytes")
    gib = "" if peak is None else f"{peak / 2**30:7.3f} GiB"
    times = f"{row['ms']:9.3f} ms  host {row['host_ms']:8.3f} ms"
    return (
        f"  {arm:<42}{times}  x{row.get('ratio', float('nan')):.3f} {row.get('spread', '')} {gib}"
    )


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


def main(words: list[str] | None = None) -> None:
    """Run the check."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=520, help="time there is")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--commit", help="of the code that runs, where git cannot say it")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", default="", help="cases with this in 'section: name'")
    options = parser.parse_args(words)
    options.words = words
    device = "cpu" if options.rehearse else "cuda"
    clock = Clock(STARTED + options.seconds)
    effort = {"rounds": 2, "steps": 1} if options.rehearse else {"rounds": 7, "steps": 4}
    costs = Costs(device, clock, attempt, **effort)
    cases = plan(costs, rehearse=options.rehearse)
    chosen = [c for c in cases if options.only in f"{c.section}: {c.name}"]
    record = Record(options.out, provenance(options, device))
    check(chosen, record, clock, device)
    print(table(record), flush=True)


if __name__ == "__main__":
    main()
