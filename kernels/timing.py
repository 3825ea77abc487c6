"""The time of calls on a device: replays of a CUDA graph between events, or a host clock on a CPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]

L2_BYTES = 64 * 2**20
"""The last-level cache of a GPU that does not tell its own: no smaller than an H200's."""
REPLAYS = 11
_IN_A_GRAPH = 1e-3  # seconds of work in one graph: the launch of a graph is lost in them
_MOST_CALLS = 512


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call, and how it was taken: "graph", "events" (with why not as a graph) or "clock"."""

    seconds: float
    method: str


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last-level cache, `L2_BYTES` where it does not tell them."""
    if device.type != "cuda":
        return L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2_BYTES)


def copies(nbytes: int, at_most: int = 48, *, cache: int = L2_BYTES) -> int:
    """How many buffers of `nbytes` take turns: three times as many bytes as a `cache` holds, but not more buffers than
    `at_most`.

    Small ones stay in the cache then: see `cached`.
    """
    return max(1, min(at_most, -(-3 * cache // max(nbytes, 1))))


def cached(nbytes: int, count: int, *, cache: int) -> bool:
    """Whether `count` buffers of `nbytes` may all lie in a `cache`: their rate is not the memory's then."""
    return count * nbytes <= cache


def timed(calls: Calls, device: torch.device, *, replays: int = REPLAYS) -> Timing:
    """The median time of one of the `calls`, which are run in turn over and over; on a GPU over so many `replays`."""
    if device.type != "cuda":
        return Timing(_clocked(calls), "clock")
    for call in calls:  # compiles, and fills caches
        call()
    torch.cuda.synchronize()
    once = between_events(lambda: _all(calls))
    try:
        return Timing(_replayed(calls, once, replays), "graph")
    except Exception as error:  # noqa: BLE001 - whatever keeps calls out of a graph, they can be timed without
        torch.cuda.synchronize()
        reason = str(error).strip().splitlines()[:1]
        seconds = statistics.median(between_events(lambda: _all(calls)) for _ in range(5)) / len(calls)
        return Timing(seconds, f"events ({type(error).__name__}: {''.join(reason)[:120]})")


def _all(calls: Calls) -> None:
    for call in calls:
        call()


def _replayed(calls: Calls, once: float, replays: int) -> float:
    """Seconds of one call in a CUDA graph; `once` is what all of them take in turn."""
    rounds = max(1, min(int(_IN_A_GRAPH / max(once, 1e-6)), _MOST_CALLS // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            _all(calls)
    graph.replay()
    taken = statistics.median(between_events(graph.replay) for _ in range(replays))
    return taken / (rounds * len(calls))


def between_events(run: Callable[[], object]) -> float:
    """Seconds on the GPU between events in front of and behind a call."""
    start, stop = _event(), _event()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch does not annotate it


def _clocked(calls: Calls) -> float:
    _all(calls)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        _all(calls)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) / len(calls)
