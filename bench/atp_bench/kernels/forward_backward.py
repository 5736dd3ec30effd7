"""Rivals for one result, timed in turns, forward and backward, and held to float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from atp_bench.clock import now
from atp_bench.interleaved_timing import interleaved_timing

Rival = TypeVar("Rival")
Times = tuple[float, float, int]
"""Forward and backward in seconds; bytes: a GPU's peak, on a CPU what autograd keeps."""


def compared(
    rivals: Mapping[str, Rival],
    *,
    times: Callable[[Rival], Times],
    error: Callable[[Rival], float],
    rounds: int,
    tolerance: float,
    flops: float,
) -> dict[str, dict[str, Any]]:
    """Medians and the error of each; speedup over the first, and rate, only where it is right."""
    errors = {name: error(rival) for name, rival in rivals.items()}
    found = interleaved_timing({n: partial(times, rival) for n, rival in rivals.items()}, rounds)
    totals = {n: statistics.median(f + b for f, b, _ in each) for n, each in found.items()}
    base = next(iter(totals.values()))
    return {
        name: {
            "forward_ms": statistics.median(f for f, _, _ in each) * 1e3,
            "backward_ms": statistics.median(b for _, b, _ in each) * 1e3,
            "memory_bytes": max(memory for _, _, memory in each),
            "error": errors[name],
            "speedup": base / totals[name] if errors[name] <= tolerance else None,
            "flops_per_s": flops / totals[name] if errors[name] <= tolerance else None,
        }
        for name, each in found.items()
    }


def clocked(forward: Callable[[], tuple[Tensor, Tensor]]) -> Times:
    """One forward and backward. forward: gives (y, its gradient)."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = now()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, dy = forward()
    middle = now()
    y.backward(dy)
    ended = now()
    memory = torch.cuda.max_memory_allocated() if y.is_cuda else sum(kept.values())
    return middle - began, ended - middle, memory


def largest_error(found: Iterable[Tensor | None], exact: Iterable[Tensor]) -> float:
    """The largest error of any tensor, over the largest value of its exact one. None: not told."""
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a is not None]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
