"""Time on a GPU by its own events, from the replay of a CUDA graph; on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from atp_bench.interleaved_timing import interleaved_timing

Action = Callable[[], Any]
_WARM_UPS = 3
_LEAST_MS = 20.0
"""Of a sample: shorter actions are repeated in it."""


def timed(actions: Mapping[str, Action], *, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of every action, the actions in turns: median and quartiles over rounds.

    On a GPU each is captured as a CUDA graph and replayed; `graph` says why not where it cannot be,
    and the action itself is then run between events.
    """
    prepared = {name: prepare(action, device) for name, action in actions.items()}
    samples = {name: sampler(run, device) for name, (run, _) in prepared.items()}
    found = interleaved_timing(samples, rounds)
    return {
        name: {"ms": statistics.median(each), "quartiles_ms": _quartiles(each)}
        | ({} if device == "cpu" else {"graph": prepared[name][1]})
        for name, each in found.items()
    }


def _quartiles(samples: list[float]) -> list[float]:
    if len(samples) < 2:
        return [samples[0], samples[0]]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return [first, third]


def prepare(action: Action, device: str) -> tuple[Action, bool | str]:
    """The action to be timed, and whether it is a graph's replay, or why not."""
    if device == "cpu":
        return action, False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            action()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return action, _first_line(error)
    return graph.replay, True


def sampler(run: Action, device: str) -> Callable[[], float]:
    """A function that runs once and gives the milliseconds of one run."""
    if device == "cpu":
        return lambda: clocked_ms(run)
    once = _between_events(run, 1)
    times = max(1, min(200, round(_LEAST_MS / max(once, 1e-3))))
    return lambda: _between_events(run, times)


def clocked_ms(run: Action) -> float:
    """By the host's clock, after all that a GPU was given to do."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def _between_events(run: Action, times: int) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(times):
        run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / times


def host_costs(action: Action, device: str) -> dict[str, Any]:
    """Of one run after a warm-up: wall time, the GPU's own time, launches, reads back to the host,
    and the peak of the device's memory above what was held before. On a CPU the wall time alone."""
    action()
    if device == "cpu":
        return {"wall_ms": clocked_ms(action)}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    wall = clocked_ms(action)
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        action()
        torch.cuda.synchronize()
    events = seen.key_averages()
    return {
        "wall_ms": wall,
        "gpu_ms": sum(e.self_device_time_total for e in events) / 1e3,
        "launches": sum(e.count for e in events if "LaunchKernel" in e.key),
        "reads_by_the_host": _reads(action),
        "peak_bytes": peak,
        "peak_bytes_above_before": peak - held,
    }


def _reads(action: Action) -> int:
    """How often the host waits for the device in one run, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in said)


def free() -> None:
    """Give back what torch's allocator keeps, so that sections' parts do not add up."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
