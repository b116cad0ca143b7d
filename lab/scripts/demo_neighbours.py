"""How much slower is ``dynlora demo`` beside busy programs, and which way of waiting is best?

    python lab/scripts/demo_neighbours.py --out lab/results/demo-neighbours.json

A training step of the demo (its encoder, adapter and batches) is timed beside 0, 1, … processes that
each keep a core busy. Each arm is a process of its own, since OpenMP reads how to wait when torch is
loaded; the arms take turns within a round, and only ratios within a round count. ``--stand-in`` times a
stack of linear layers of the encoder's shapes instead, which needs torch alone and loads in little time.
"""

import argparse
import contextlib
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

STEPS = 2
ARMS = {
    "as torch does it": {},
    "passive waiting": {"OMP_WAIT_POLICY": "PASSIVE"},
    "half the threads": {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))},
}
BUSY = "import os; os.sched_setaffinity(0, {%d})\nwhile True: pass"


def main() -> None:
    """Measure all, write after every round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(stand_in if options.stand_in else demo_step)
        return

    rows = []
    with contextlib.ExitStack() as stack:
        children = {
            name: stack.enter_context(child(env, is_stand_in=options.stand_in))
            for name, env in ARMS.items()
        }
        for turn in range(options.rounds):
            for count in options.neighbours:
                names = list(ARMS)[turn % len(ARMS) :] + list(ARMS)[: turn % len(ARMS)]
                with neighbours(count):
                    load = os.getloadavg()[0]
                    seconds = {name: timed(children[name]) for name in names}
                rows.append({"round": turn, "neighbours": count, "load": load, "step_s": seconds})
                print(rows[-1], flush=True)
    from dynlora_lab.tasks.provenance import machine, source_commit, versions
    from dynlora_lab.tasks.whole_file import write_json

    write_json(
        options.out,
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python lab/scripts/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
            "commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
            "steps_timed": STEPS,
            "environment": ARMS,
            "ratio_to_torch": ratios(rows),
            "rounds": rows,
        },
    )


def ratios(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and greatest of an arm's time over that of the first arm in the same round."""
    first = next(iter(ARMS))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for count in sorted({row["neighbours"] for row in rows}):
        mine = [row["step_s"] for row in rows if row["neighbours"] == count]
        for name in ARMS:
            values = [seconds[name] / seconds[first] for seconds in mine]
            found.setdefault(str(count), {})[name] = {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
                "step_s": round(statistics.median(seconds[name] for seconds in mine), 3),
            }
    return found


@contextlib.contextmanager
def child(environment: dict[str, str], *, is_stand_in: bool) -> Iterator[subprocess.Popen]:
    """A process that makes steps on request, ready."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_"))}
    command = [sys.executable, "-W", "ignore", __file__, "--child"]
    command += ["--stand-in"] if is_stand_in else []
    process = subprocess.Popen(
        command,
        env=inherited | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        timed(process)  # loaded, and warm
        yield process
    finally:
        process.kill()
        process.wait()


def timed(process: subprocess.Popen) -> float:
    """Seconds of a step."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """``count`` processes that keep one core busy each."""
    cpus = sorted(os.sched_getaffinity(0))
    running = [
        subprocess.Popen([sys.executable, "-c", BUSY % cpus[i % len(cpus)]]) for i in range(count)
    ]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def serve(make: Callable[[], Callable[[int], object]]) -> None:
    """In the child: make steps on request, and print the seconds of one."""
    out = sys.stdout
    sys.stdout = sys.stderr
    step = make()
    for _ in sys.stdin:
        began = time.perf_counter()
        for number in range(STEPS):
            step(number)
        print((time.perf_counter() - began) / STEPS, file=out, flush=True)


def demo_step() -> Callable[[int], object]:
    """A training step of the demo, by the number of its batch."""
    import torch

    from dynlora_lab.tasks.demo_run import DEFAULT_MODEL, demo_recipe, splits_of
    from dynlora_lab.tasks.labelled_texts import shipped_sample
    from dynlora_lab.tasks.run import build_model, checked_data

    with tempfile.TemporaryDirectory() as folder:
        recipe = demo_recipe(
            output=Path(folder),
            model=DEFAULT_MODEL,
            data=None,
            init_r=6,
            target_r=4,
            epochs=1,
            max_steps=None,
            learning_rate=3e-3,
            batch_size=32,
            seed=0,
        )
    prepared, adapted = build_model(recipe, checked_data(recipe, splits_of(shipped_sample())))
    model = adapted.model.train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    rows = [prepared.train[i] for i in range(32 * STEPS)]
    batches = [prepared.collator(rows[32 * i : 32 * (i + 1)]) for i in range(STEPS)]

    def step(number: int) -> None:
        model(**batches[number]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stand_in() -> Callable[[int], object]:
    """Forward and backward pass through linear layers as wide as the demo's encoder, 32 x 24 tokens."""
    import torch
    from torch import nn

    wide, narrow = nn.Linear(384, 1536), nn.Linear(1536, 384)
    layers = [nn.Linear(384, 384) for _ in range(4)] + [wide, nn.GELU(), narrow, nn.LayerNorm(384)]
    model = nn.Sequential(*layers * 6)
    batch = torch.randn(32 * 24, 384, requires_grad=True)
    return lambda _number: model(batch).sum().backward()


if __name__ == "__main__":
    main()
