"""Triton: residual, RMS norm and x A^T in one read of the stream, written as [x | x A^T | 0]; and
the norm's backward with the stream's own gradient added.

A program has BLOCK_M tokens and goes over the hidden size twice: for the mean square, then for x.
Legend: stream, delta, new [M, K]; weight [K]; a [r, K]; whole [M, K + room]; root [M].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Within the budgets of tests/atp_kernels/budgets.json; not measured yet on a GPU.
BLOCK_M, BLOCK_K = 16, 64
BACKWARD = {"BLOCK_M": 4, "BLOCK_K": 512}


@triton.jit
def norm_forward_kernel(  # type: ignore[no-untyped-def]
    stream_ptr, delta_ptr, weight_ptr, a_ptr, new_ptr, whole_ptr, root_ptr,
    M, K, room, r, eps,
    HAS_DELTA: tl.constexpr, HAS_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R: room, up to a power of two."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    there = rows < M
    from_rows = rows.to(tl.int64)[:, None] * K
    into_rows = rows.to(tl.int64)[:, None] * (K + room)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        inside = there[:, None] & (k[None, :] < K)
        n = tl.load(stream_ptr + from_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            n += tl.load(delta_ptr + from_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            n = n.to(new_ptr.dtype.element_ty)
            tl.store(new_ptr + from_rows + k[None, :], n, mask=inside)
            n = n.to(tl.float32)
        squares += tl.sum(n * n, axis=1)
    root = 1.0 / tl.sqrt(squares / K + eps)
    tl.store(root_ptr + rows, root, mask=there)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        inside = there[:, None] & (k[None, :] < K)
        # Read again, not what was written: other threads of the program may have done that.
        n = tl.load(stream_ptr + from_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            n += tl.load(delta_ptr + from_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            n = n.to(new_ptr.dtype.element_ty).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = (weight[None, :] * (n * root[:, None])).to(whole_ptr.dtype.element_ty)
        tl.store(whole_ptr + into_rows + k[None, :], x, mask=inside)
        if HAS_A:
            a = tl.load(
                a_ptr + rank.to(tl.int64)[:, None] * K + k[None, :],
                mask=(rank[:, None] < r) & (k[None, :] < K), other=0.0,
            )  # fmt: skip
            s = tl.dot(x, tl.trans(a), s, input_precision="ieee")
    if HAS_A:
        tl.store(
            whole_ptr + into_rows + K + rank[None, :], s.to(whole_ptr.dtype.element_ty),
            mask=there[:, None] & (rank[None, :] < room),
        )  # fmt: skip


@triton.jit
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    dx_ptr, stream_ptr, weight_ptr, root_ptr, beside_ptr, d_stream_ptr, M, K, stride_dx,
    HAS_BESIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_stream [M, K]: beside + the norm's own from dx [M, K] of rows `stride_dx` apart."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    there = rows < M
    from_rows = rows.to(tl.int64)[:, None] * K
    dx_rows = rows.to(tl.int64)[:, None] * stride_dx
    root = tl.load(root_ptr + rows, mask=there, other=0.0)
    along = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        inside = there[:, None] & (k[None, :] < K)
        g = tl.load(dx_ptr + dx_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        n = tl.load(stream_ptr + from_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        along += tl.sum(g * weight[None, :] * n, axis=1)
    along = along * root * root / K
    for start in range(0, K, BLOCK_K):
        k = start + inner
        inside = there[:, None] & (k[None, :] < K)
        g = tl.load(dx_ptr + dx_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        n = tl.load(stream_ptr + from_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        out = (g * weight[None, :] - n * along[:, None]) * root[:, None]
        if HAS_BESIDE:
            more = tl.load(beside_ptr + from_rows + k[None, :], mask=inside, other=0.0)
            out += more.to(tl.float32)
        out = out.to(d_stream_ptr.dtype.element_ty)
        tl.store(d_stream_ptr + from_rows + k[None, :], out, mask=inside)


def norm_into(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    room: int,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_into`, of contiguous inputs; the new stream is empty where delta is."""
    m, k = stream.shape
    new = stream.new_empty((0, 0) if delta is None else (m, k), dtype=_sum_type(stream, delta))
    whole = stream.new_empty((m, k + room), dtype=kind)
    root = stream.new_empty(m, dtype=torch.float32)
    absent = stream.new_empty(1)
    if stream.numel():
        norm_forward_kernel[(triton.cdiv(m, BLOCK_M),)](
            stream, absent if delta is None else delta, weight, absent if a is None else a,
            new if delta is not None else stream, whole, root, m, k, room,
            0 if a is None else len(a), eps,
            HAS_DELTA=delta is not None, HAS_A=a is not None,
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=max(16, triton.next_power_of_2(room)),
        )  # fmt: skip
    return new, whole, root


def norm_backward(
    dx: Tensor, stream: Tensor, weight: Tensor, root: Tensor, beside: Tensor | None
) -> Tensor:
    """As `reference.norm_backward`; dx may be rows of a wider tensor."""
    m, k = stream.shape
    out = torch.empty_like(stream)
    if stream.numel():
        norm_backward_kernel[(triton.cdiv(m, BACKWARD["BLOCK_M"]),)](
            dx, stream, weight, root, stream if beside is None else beside, out, m, k,
            dx.stride(0), HAS_BESIDE=beside is not None, **BACKWARD,
        )  # fmt: skip
    return out


def _sum_type(stream: Tensor, delta: Tensor | None) -> torch.dtype:
    return stream.dtype if delta is None else torch.promote_types(stream.dtype, delta.dtype)
