"""How all benchmarks measure: arms take turns in one process, ratios are taken within a round."""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROUNDS = 7


def arguments(description: str) -> argparse.Namespace:
    """Options that every script shares."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds that count, after one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def seconds(work: Callable[[], Any], device: str) -> float:
    """Time of one call: CPU time of the process on a CPU, which other programs do not lengthen."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    arms: dict[str, Callable[[], Any]], *, rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each arm in each round; the arms take turns, and each round begins with another."""
    names = list(arms)
    for name in names:
        arms[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(arms[name], device))
    return times


def ratio(times: dict[str, list[float]], arm: str, to: str) -> float:
    """Median over the rounds of one arm's time over another's."""
    return statistics.median(a / b for a, b in zip(times[arm], times[to], strict=True))


def spread(times: dict[str, list[float]], arm: str, to: str) -> tuple[float, float]:
    """Smallest and largest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(times[arm], times[to], strict=True)]
    return min(ratios), max(ratios)


def _git(*words: str) -> str:
    ran = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """What a number is worth nothing without: code, versions, machine, load and command."""
    command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    info = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "is_clean": _git("status", "--porcelain", "--", "src", "benchmarks/*.py") == "",
        "command": shlex.join(command),
        "versions": {n: version(n) for n in ("dynlora", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "threads": options.threads,
        "load_at_end": [round(v, 1) for v in os.getloadavg()],
    }
    if options.device == "cuda":
        info["machine"]["gpu"] = torch.cuda.get_device_name()  # type: ignore[index]
    return info


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    if lines.is_file():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write(question: str, options: argparse.Namespace, result: dict[str, Any]) -> Path:
    """Write ``results/<question>.<device>.json``, whole or not at all."""
    path = RESULTS / f"{question}.{options.device}.json"
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(provenance(options) | {"result": result}, indent=1) + "\n")
    draft.replace(path)
    print(f"wrote {path.relative_to(HERE.parent)}")
    return path
