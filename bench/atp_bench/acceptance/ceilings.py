"""What this device can do at best: products, skinny products, copies, and how fast the host feeds
it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import timed

_LAUNCHES = 2000


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """FLOP/s, bytes/s, and microseconds of the host a launch."""
    device, m = sizes.device, sizes.tokens

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=sizes.dtype)

    x, wide = normal(m, sizes.hidden), normal(sizes.channels, sizes.hidden)
    a, s = normal(sizes.rank, sizes.hidden), normal(m, sizes.rank)
    b, dy = normal(sizes.channels, sizes.rank), normal(m, sizes.channels)
    buffer = torch.empty(2**16 if sizes.toy else 2**30, dtype=torch.uint8, device=device)
    actions: dict[str, Callable[[], Any]] = {
        "product": lambda: x @ wide.T,
        "x A": lambda: x @ a.T,
        "s B": lambda: s @ b.T,
        "dy B": lambda: dy @ b,
        "copy": buffer.clone,
    }
    moved = {
        "product": 2.0 * m * sizes.hidden * sizes.channels,
        "x A": 2.0 * m * sizes.hidden * sizes.rank,
        "s B": 2.0 * m * sizes.channels * sizes.rank,
        "dy B": 2.0 * m * sizes.channels * sizes.rank,
    }
    rows = timed(actions, device=device, rounds=sizes.rounds)
    for name, flops in moved.items():
        rows[name]["flops_per_s"] = flops / rows[name]["ms"] * 1e3
    rows["copy"]["bytes_per_s"] = 2.0 * buffer.nbytes / rows["copy"]["ms"] * 1e3
    keep({"rows": rows})
    return {"rows": rows, "launch_us": _launch_us(device)}


def _launch_us(device: str) -> float:
    """Of the host, for a kernel that does next to nothing."""
    one = torch.zeros(1, device=device)
    count = _LAUNCHES if device == "cuda" else _LAUNCHES // 10
    one.add_(1)
    began = time.perf_counter()
    for _ in range(count):
        one.add_(1)
    took = time.perf_counter() - began
    assert float(one) == count + 1
    return took / count * 1e6
