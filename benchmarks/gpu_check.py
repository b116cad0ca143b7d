"""Does what holds on a CPU hold on a GPU? One prepared run, for whenever a GPU is at hand.

    python benchmarks/gpu_check.py --seconds 520 --out benchmarks/results/gpu/DATE-COMMIT
    python benchmarks/gpu_check.py --rehearse --out FOLDER     (tiny shapes on the CPU, a minute)

It needs torch, transformers, peft, accelerate and, if dynlora is not installed, PYTHONPATH=src. Cases run
in the order of their worth; each one's result is in its section's JSON as soon as it ends, so the run may
be killed at any moment. A case that raises leaves its traceback there, and the next one runs. A failed
assertion on the device makes the whole process useless for it, so the cases run in a process of their
own, and what is left runs in the next one.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

STARTED = time.monotonic()  # imports take their share of the time there is
GRACE = 20.0  # seconds beyond its time after which a worker that hangs is ended


def parsed(words: list[str]) -> argparse.Namespace:
    """The options, and ``words`` as given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=520, help="time there is")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--commit", help="of the code that runs, where git cannot say it")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", default="", help="cases with this in 'section: name'")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a worker: its end
    options = parser.parse_args(words)
    options.words = words
    return options


def supervise(words: list[str], out: Path, end: float) -> None:
    """Run workers until one has seen all cases; each takes up what the one before it left.

    A worker that adds nothing to the record is the last: the next would do no better.
    """
    while True:
        known = recorded(out)
        command = [sys.executable, __file__, *words, "--until", str(end)]
        try:
            ended = subprocess.run(command, check=False, timeout=end + GRACE - time.monotonic())
        except subprocess.TimeoutExpired:
            print("a worker hung, and was ended", flush=True)
            return
        if ended.returncode == 0 or recorded(out) == known:
            return
        print(f"a worker ended with {ended.returncode}; the next one goes on", flush=True)


def recorded(out: Path) -> int:
    """Bytes of the record, which grows with every case."""
    return sum(path.stat().st_size for path in out.glob("*.json"))


def main(words: list[str] | None = None) -> None:
    """Run the check."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
    words = sys.argv[1:] if words is None else words
    options = parsed(words)
    if options.rehearse or options.until is not None:
        from gpu_plan import work  # only here: it imports torch

        end = STARTED + options.seconds if options.until is None else options.until
        sys.exit(work(options, end))
    if any(options.out.glob("*.json")):
        sys.exit(f"--out {options.out} holds results already: name another folder, or move them.")
    supervise(words, options.out, STARTED + options.seconds)


if __name__ == "__main__":
    main()
