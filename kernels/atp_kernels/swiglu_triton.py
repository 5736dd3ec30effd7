"""Triton: h = mask * silu(e) * u, written as [h | h A^T | 0] where a product reads it so; and its
backward, with the mask's gradient and the importance summed on the way.

The backward reads what it must anyway (dh, e, u) and sums p = dh * silu(e) * u, and p^2, over a
tile of tokens into partial sums, added afterwards in a fixed order.
Legend: e, u, h, dh [M, N] of rows `stride` apart; mask [N]; a [r, N]; out [M, N + room].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured yet on a GPU.
BLOCK_M, BLOCK_N = 32, 128
# Of a program that makes h A^T: it has its tokens' whole rows.
WITH_A = {"BLOCK_M": 16, "BLOCK_N": 64}


@triton.jit
def swiglu_forward_kernel(  # type: ignore[no-untyped-def]
    e_ptr, u_ptr, mask_ptr, a_ptr, out_ptr, M, N, span, stride_e, stride_u, room, r,
    HAS_MASK: tl.constexpr, HAS_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some rows of out, in columns of `span` a program: with A all, without it BLOCK_N."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    there = rows < M
    wide = rows.to(tl.int64)[:, None]
    first = tl.program_id(1) * span
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(first, tl.minimum(first + span, N), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = there[:, None] & (columns[None, :] < N)
        e = tl.load(e_ptr + wide * stride_e + columns[None, :], mask=inside, other=0.0)
        u = tl.load(u_ptr + wide * stride_u + columns[None, :], mask=inside, other=0.0)
        e = e.to(tl.float32)
        h = e * tl.sigmoid(e) * u.to(tl.float32)
        if HAS_MASK:
            kept = tl.load(mask_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
            h = kept[None, :] * h
        h = h.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + wide * (N + room) + columns[None, :], h, mask=inside)
        if HAS_A:
            a = tl.load(
                a_ptr + rank.to(tl.int64)[:, None] * N + columns[None, :],
                mask=(rank[:, None] < r) & (columns[None, :] < N), other=0.0,
            )  # fmt: skip
            s = tl.dot(h, tl.trans(a), s, input_precision="ieee")
    if HAS_A:
        tl.store(
            out_ptr + wide * (N + room) + N + rank[None, :], s.to(out_ptr.dtype.element_ty),
            mask=there[:, None] & (rank[None, :] < room),
        )  # fmt: skip


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    dh_ptr, e_ptr, u_ptr, mask_ptr, both_ptr, partial_ptr, square_ptr,
    M, N, stride_dh, stride_e, stride_u,
    HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of [de | du] [M, 2 N]; with a mask its share of the mask's gradient and of the
    importance."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    wide = rows.to(tl.int64)[:, None]
    dh = tl.load(dh_ptr + wide * stride_dh + columns[None, :], mask=inside, other=0.0)
    e = tl.load(e_ptr + wide * stride_e + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + wide * stride_u + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    dh = dh.to(tl.float32)
    sigmoid = tl.sigmoid(e)
    silu = e * sigmoid
    if HAS_MASK:
        product = dh * silu * u
        at = tl.program_id(0).to(tl.int64) * N + columns
        tl.store(partial_ptr + at, tl.sum(product, axis=0), mask=columns < N)
        tl.store(square_ptr + at, tl.sum(product * product, axis=0), mask=columns < N)
        kept = tl.load(mask_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        dh = dh * kept[None, :]
    de = dh * u * (sigmoid + silu * (1 - sigmoid))
    into = both_ptr + wide * 2 * N + columns[None, :]
    tl.store(into, de.to(both_ptr.dtype.element_ty), mask=inside)
    tl.store(into + N, (dh * silu).to(both_ptr.dtype.element_ty), mask=inside)


def swiglu_forward(
    e: Tensor, u: Tensor, mask: Tensor | None, a: Tensor | None, room: int
) -> Tensor:
    """As `reference.masked_swiglu`; e, u [M, N] may be rows of wider tensors."""
    m, n = e.shape
    out = e.new_empty(m, n + room)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N} if a is None else WITH_A
    if e.numel():
        span = blocks["BLOCK_N"] if a is None else n
        swiglu_forward_kernel[(triton.cdiv(m, blocks["BLOCK_M"]), triton.cdiv(n, span))](
            e, u, e if mask is None else mask, e if a is None else a, out, m, n, span,
            e.stride(0), u.stride(0), room, 0 if a is None else len(a),
            HAS_MASK=mask is not None, HAS_A=a is not None,
            BLOCK_R=max(16, triton.next_power_of_2(room)), **blocks,
        )  # fmt: skip
    return out


def swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """([de | du] [M, 2 N], the mask's gradient and importance [N] in fp32, empty without one)."""
    m, n = e.shape
    both = e.new_empty(m, 2 * n)
    tiles = triton.cdiv(m, BLOCK_M)
    partial, square = (
        e.new_empty((0, 0) if mask is None else (tiles, n), dtype=torch.float32) for _ in range(2)
    )
    if e.numel():
        swiglu_backward_kernel[(tiles, triton.cdiv(n, BLOCK_N))](
            dh, e, u, e if mask is None else mask, both, partial, square, m, n,
            dh.stride(0), e.stride(0), u.stride(0),
            HAS_MASK=mask is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    return both, partial.sum(0), square.sum(0)
