"""Times on a GPU: arms take turns, each timed by events, until the rounds or the time are used up."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Clock:
    """The time there is.

    Attributes:
        end: when to be done, in ``time.monotonic`` seconds.
    """

    end: float

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], device: str, *, times: int) -> tuple[float, float]:
    """Time of one of ``times`` calls.

    Returns:
        Milliseconds on the device between the first and the last, and milliseconds until the host had
        asked for all of it. Where the second is about the first, the host is what limits.
    """
    synchronize(device)
    began = time.perf_counter()
    if device != "cuda":
        for _ in range(times):
            work()
        took = (time.perf_counter() - began) * 1000 / times
        return took, took
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        work()
    last.record()
    host = (time.perf_counter() - began) * 1000 / times
    last.synchronize()
    return first.elapsed_time(last) / times, host


def compared(
    arms: dict[str, Callable[[], Any]],
    base: str,
    device: str,
    clock: Clock,
    *,
    rounds: int,
    steps: int,
) -> dict[str, dict[str, Any]]:
    """Times of arms that take turns, each round begins with another; ratios are taken within a round.

    Args:
        arms: what each does.
        base: the arm that the ratios divide by.
        device: "cuda" or "cpu".
        clock: after three rounds, no round begins when its time is up.
        rounds: how many rounds, after one that does not count.
        steps: calls of each arm in a round.

    Returns:
        By arm: ms and host_ms (medians), ratio (median), spread (smallest and largest ratio), rounds (all
        ms).
    """
    names = list(arms)
    for name in names:
        milliseconds(arms[name], device, times=2)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn >= 3 and clock.left < 0:
            break
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            times[name].append(milliseconds(arms[name], device, times=steps))
    return {name: _row(times[name], times.get(base)) for name in names}


def _row(
    times: list[tuple[float, float]], base: list[tuple[float, float]] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "ms": round(statistics.median(t for t, _ in times), 4),
        "host_ms": round(statistics.median(h for _, h in times), 4),
        "rounds": [round(t, 4) for t, _ in times],
    }
    if base is not None:
        ratios = [t / b for (t, _), (b, _) in zip(times, base, strict=True)]
        row["ratio"] = round(statistics.median(ratios), 4)
        row["spread"] = [round(min(ratios), 4), round(max(ratios), 4)]
    return row


def memory_of(work: Callable[[], Any], device: str) -> int | None:
    """Bytes allocated at the peak of a call, above what was allocated before it; None on a CPU."""
    if device != "cuda":
        work()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def allocated_bytes(device: str) -> int | None:
    """Bytes allocated now; None on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else None
