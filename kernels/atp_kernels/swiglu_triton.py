"""Triton: h = mask * silu(e) * u and its backward, the mask's gradient summed on the way.

The backward reads what it must anyway (dh, e, u) and sums dh * silu(e) * u over a tile of tokens
into partial sums, added afterwards in a fixed order. Legend: e, u, h, dh [M, N]; mask [N].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured yet on a GPU.
BLOCK_M, BLOCK_N = 32, 128


@triton.jit
def swiglu_forward_kernel(  # type: ignore[no-untyped-def]
    e_ptr, u_ptr, mask_ptr, h_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of h."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    e = tl.load(e_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(mask_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    h = kept[None, :] * e * tl.sigmoid(e) * u
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    dh_ptr, e_ptr, u_ptr, mask_ptr, de_ptr, du_ptr, partial_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of de and du, and its share of the mask's gradient."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    dh = tl.load(dh_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(mask_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(e)
    silu = e * sigmoid
    partial = tl.sum(dh * silu * u, axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + columns, partial, mask=columns < N)
    dh = dh * kept[None, :]
    de = dh * u * (sigmoid + silu * (1 - sigmoid))
    tl.store(de_ptr + offsets, de.to(de_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + offsets, (dh * silu).to(du_ptr.dtype.element_ty), mask=inside)


def swiglu_forward(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """h [M, N] from contiguous e, u [M, N] and mask [N]."""
    h = torch.empty_like(e)
    m, n = e.shape
    if e.numel():
        grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))
        swiglu_forward_kernel[grid](e, u, mask, h, m, n, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return h


def swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(de, du [M, N], dmask [N] in fp32)."""
    de, du = torch.empty_like(e), torch.empty_like(u)
    m, n = e.shape
    tiles = triton.cdiv(m, BLOCK_M)
    partial = e.new_empty((tiles, n), dtype=torch.float32)
    if e.numel():
        grid = (tiles, triton.cdiv(n, BLOCK_N))
        swiglu_backward_kernel[grid](
            dh, e, u, mask, de, du, partial, m, n, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N
        )
    return de, du, partial.sum(0)
