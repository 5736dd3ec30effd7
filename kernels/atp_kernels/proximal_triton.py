"""Triton: the proximal step on all LoRA factors of a model, in one launch.

A table [factors, 8] on the device has of every factor its address, the strides of its structures,
of what lies within one and of its rank, how much lies within one, the address and size of its mask,
and its rank. A program has some structures of one factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured yet on a GPU.
BLOCK_S, BLOCK_W = 32, 1


@triton.jit
def proximal_kernel(  # type: ignore[no-untyped-def]
    table_ptr, threshold,
    BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """w <- w / |w| * max(|w| - threshold, 0) where the mask does not keep; fp32, in place."""
    row = table_ptr + tl.program_id(0) * 8
    w_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    stride_s, stride_w, stride_r = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    width = tl.load(row + 4)
    mask_ptr = tl.load(row + 5).to(tl.pointer_type(tl.int8))
    size, rank = tl.load(row + 6), tl.load(row + 7)
    structures = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    there = structures < size
    removed = there & (tl.load(mask_ptr + structures, mask=there, other=1) == 0)
    ranks = tl.arange(0, BLOCK_R)
    within = tl.arange(0, BLOCK_W)
    base = w_ptr + structures[:, None, None] * stride_s + ranks[None, None, :] * stride_r
    chosen = removed[:, None, None] & (ranks[None, None, :] < rank)
    squares = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for start in range(0, width, BLOCK_W):
        at = (start + within)[None, :, None]
        w = tl.load(base + at * stride_w, mask=chosen & (at < width), other=0.0)
        squares += tl.sum(tl.sum(w * w, axis=2), axis=1)
    norms = tl.maximum(tl.sqrt(squares), 1e-30)
    shrunk = tl.maximum(1.0 - threshold / norms, 0.0)
    for start in range(0, width, BLOCK_W):
        at = (start + within)[None, :, None]
        inside = chosen & (at < width)
        w = tl.load(base + at * stride_w, mask=inside, other=0.0)
        tl.store(base + at * stride_w, w * shrunk[:, None, None], mask=inside)


def proximal_step(groups: Sequence[Tensor], stays: Sequence[Tensor], threshold: float) -> None:
    """As `reference.proximal_step`, of fp32 views [structures, within, rank] and bool masks."""
    rows = [
        (g.data_ptr(), *g.stride(), m.data_ptr(), len(m), g.shape[1], g.shape[2])
        for g, m in zip(groups, stays, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64)[:, [0, 1, 2, 3, 6, 4, 5, 7]].contiguous()
    largest, rank = max(len(m) for m in stays), max(g.shape[2] for g in groups)
    proximal_kernel[(len(rows), triton.cdiv(largest, BLOCK_S))](
        table.to(groups[0].device), threshold, BLOCK_S=BLOCK_S, BLOCK_W=BLOCK_W,
        BLOCK_R=triton.next_power_of_2(rank),
    )  # fmt: skip
