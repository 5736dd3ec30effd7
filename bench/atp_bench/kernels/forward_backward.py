"""Rivals timed in turns, forward and backward, and the rows that come of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Times = tuple[float, float, int]
"""Forward and backward in seconds; bytes: a GPU's peak, on a CPU what autograd keeps."""


def clocked(forward: Callable[[], tuple[Tensor, Tensor]]) -> Times:
    """One forward and backward. forward: gives (y, its gradient)."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = _now()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, dy = forward()
    middle = _now()
    y.backward(dy)
    ended = _now()
    memory = torch.cuda.max_memory_allocated() if y.is_cuda else sum(kept.values())
    return middle - began, ended - middle, memory


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved_timing(runs: dict[str, Callable[[], Times]], rounds: int) -> dict[str, list[Times]]:
    """Every run once a round, there and back, after a round that is not counted."""
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items() if i % 2 else reversed(runs.items()):
            one = run()
            if i:
                found[name].append(one)
    return found


def rows(
    found: dict[str, list[Times]], errors: dict[str, float], *, tolerance: float, flops: float
) -> dict[str, dict[str, Any]]:
    """Medians and the error of each; speedup over the first, and rate, only where it is right."""
    totals = {n: statistics.median(f + b for f, b, _ in times) for n, times in found.items()}
    base = totals[next(iter(totals))]
    return {
        name: {
            "forward_ms": statistics.median(f for f, _, _ in times) * 1e3,
            "backward_ms": statistics.median(b for _, b, _ in times) * 1e3,
            "memory_bytes": max(memory for _, _, memory in times),
            "error": errors[name],
            "speedup": base / totals[name] if errors[name] <= tolerance else None,
            "flops_per_s": flops / totals[name] if errors[name] <= tolerance else None,
        }
        for name, times in found.items()
    }
