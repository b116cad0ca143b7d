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
        Milliseconds on the device between the first and the last, and milliseconds that the host needs
        to ask for one, with an idle device before it. Where both are about equal, the host is what
        limits, or it waits for the device, whose queue holds about a thousand kernels.
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
    work()
    host = (time.perf_counter() - began) * 1000
    for _ in range(times - 1):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / times, host


def compared(
    arms: dict[str, Callable[[], Any]],
    peers: dict[str, str],
    device: str,
    clock: Clock,
    *,
    rounds: int,
    steps: int,
) -> dict[str, dict[str, Any]]:
    """Times of arms that take turns, each round begins with another; ratios are taken within a round.

    Args:
        arms: what each does.
        peers: by arm the one whose time its own is divided by.
        device: "cuda" or "cpu".
        clock: after three rounds, no round begins when its time is up.
        rounds: how many rounds, after one that does not count.
        steps: calls of each arm in a round.

    Returns:
        By arm: ms and host_ms (medians), peer, ratio (median), host_ratio (median), spread (smallest and
        largest ratio), rounds (all ms).
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
    return {name: _row(times, name, peers[name]) for name in names}


def _row(times: dict[str, list[tuple[float, float]]], name: str, peer: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "ms": round(statistics.median(t for t, _ in times[name]), 4),
        "host_ms": round(statistics.median(h for _, h in times[name]), 4),
        "rounds": [round(t, 4) for t, _ in times[name]],
        "peer": peer,
    }
    if peer in times:
        pairs = list(zip(times[name], times[peer], strict=True))
        ratios = [t / b for (t, _), (b, _) in pairs]
        row["ratio"] = round(statistics.median(ratios), 4)
        row["host_ratio"] = round(statistics.median(h / b for (_, h), (_, b) in pairs), 4)
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
