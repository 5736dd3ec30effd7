"""Triton's product at other tiles: forward, and the backward whose list stands on W's contiguous
dimension ("down backward, fixed")."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from atp_bench.acceptance.backend import kernels_by, triton_absent
from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import free, timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Of one program; warps and stages as Triton has them."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


TODAY = "as it is"
_REAL = tuple(
    Tile(m=m, n=n, k=k, warps=warps, stages=stages)
    for (m, n), k, warps, stages in product(
        ((128, 128), (128, 256), (256, 128), (64, 256)), (32, 64), (4, 8), (3, 4)
    )
)
_TOY = (Tile(m=16, n=16, k=16, warps=4, stages=2), Tile(m=32, n=16, k=16, warps=4, stages=2))


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Milliseconds by case and tile; a tile that does not compile or launch has the reason."""
    if reason := triton_absent(sizes.device):
        return {"absent": reason}
    found: dict[str, Any] = {"cases": {}}
    with kernels_by("triton"):
        for name, run in _cases(sizes).items():
            rows = found["cases"][name] = {}
            for tile in (None, *(_TOY if sizes.toy else _REAL)):
                rows[str(tile or TODAY)] = _row(tile, run, sizes)
                keep(found)
            _ratios(rows)
    free()
    return found


def _cases(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    from atp_kernels.masked_gemm_triton import masked_gemm

    # The interpreter's bf16 is wrong (docs/kernels.md).
    kind = torch.float16 if sizes.toy else sizes.dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=sizes.device, dtype=kind)

    m, h, c, r = sizes.tokens, sizes.hidden, sizes.channels, sizes.rank
    mask = torch.rand(c, device=sizes.device) < sizes.kept
    x, dy, s = normal(m, h), normal(m, h), normal(m, r)
    up, down = normal(c, h), normal(h, c)
    b, a = normal(c, r), normal(r, c)

    def gemm(x: Any, w: Any, b: Any, out_mask: Any) -> Callable[[], Any]:
        return lambda: masked_gemm(x, w, s, b, None, out_mask, None, True, None)

    return {
        "up forward, all kept": gemm(x, up, b, None),
        "up forward, fixed": gemm(x, up, b, mask),
        "down backward, fixed": gemm(dy, down.T, a.T, mask),
        "torch's product, all kept": lambda: x @ up.T,
    }


def _row(tile: Tile | None, run: Callable[[], Any], sizes: Sizes) -> dict[str, Any]:
    with _tile(tile):
        try:
            return timed({"one": run}, device=sizes.device, rounds=sizes.rounds)["one"]
        except Exception as error:  # Out of registers or shared memory: Triton has its own types.
            return {"error": f"{type(error).__name__}: {error}"[:300]}


@contextmanager
def _tile(tile: Tile | None) -> Iterator[None]:
    from atp_kernels import masked_gemm_triton as kernel

    before = kernel.BLOCKS, kernel.NUM_WARPS, kernel.NUM_STAGES
    if tile is not None:
        kernel.BLOCKS = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        kernel.NUM_WARPS, kernel.NUM_STAGES = tile.warps, tile.stages
    try:
        yield
    finally:
        kernel.BLOCKS, kernel.NUM_WARPS, kernel.NUM_STAGES = before


def _ratios(rows: dict[str, Any]) -> None:
    for row in rows.values():
        if "ms" in row and "ms" in rows[TODAY]:
            row["over_today"] = rows[TODAY]["ms"] / row["ms"]
