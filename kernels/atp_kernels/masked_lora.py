"""Triton: the forward of `masked_lora_linear` in one kernel.

S = scaling * x A^T is computed first (rank r, one read of x); the GEMM's accumulator then takes
S B^T beside W x, so that neither product is written out and read again (the split of LoRAFusion,
arXiv 2510.00206). Masks are applied in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, out_mask_ptr, in_mask_ptr, y_ptr,
    M, N, K,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OUT_MASK: tl.constexpr, HAS_IN_MASK: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] from x [M, K], w [N, K], s [M, R], b [N, R]; contiguous; R a power of 2 from 16."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Offsets in 64 bits: M * N passes 2**31 on long batches.
    row_offsets = rows.to(tl.int64)[:, None]
    column_offsets = columns.to(tl.int64)[:, None]
    frozen = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        x = tl.load(
            x_ptr + row_offsets * K + k[None, :],
            mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + column_offsets * K + k[None, :],
            mask=(columns[:, None] < N) & (k[None, :] < K), other=0.0,
        )  # fmt: skip
        if HAS_IN_MASK:
            in_mask = tl.load(in_mask_ptr + k, mask=k < K, other=0.0)
            x = x * in_mask[None, :].to(x.dtype)
        frozen = tl.dot(x, tl.trans(w), frozen, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        frozen += bias.to(tl.float32)[None, :]
    rank = tl.arange(0, R)
    s = tl.load(s_ptr + row_offsets * R + rank[None, :], mask=rows[:, None] < M, other=0.0)
    b = tl.load(b_ptr + column_offsets * R + rank[None, :], mask=columns[:, None] < N, other=0.0)
    low_rank = tl.dot(s, tl.trans(b), input_precision="ieee")
    if HAS_OUT_MASK:
        out_mask = tl.load(out_mask_ptr + columns, mask=columns < N, other=0.0)
        scale = out_mask.to(tl.float32)[None, :]
        y = (frozen + low_rank) * scale if WHOLE else frozen * scale + low_rank
    else:
        y = frozen + low_rank
    tl.store(
        y_ptr + row_offsets * N + columns[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    scaling: float,
    whole: bool,
    blocks: tuple[int, int, int] = (64, 64, 32),
) -> Tensor:
    """`masked_lora_linear` on a GPU (or in Triton's interpreter): x [..., K] -> [..., N]."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    m, k, n = len(flat), flat.shape[1], len(weight)
    lora_x = flat * in_mask.to(flat.dtype) if whole and in_mask is not None else flat
    s = (scaling * (lora_x @ lora_a.to(flat.dtype).T)).contiguous()
    b = lora_b.to(flat.dtype)
    rank = max(16, triton.next_power_of_2(lora_a.shape[0]))
    s, b = (torch.nn.functional.pad(t, (0, rank - t.shape[1])).contiguous() for t in (s, b))
    y = flat.new_empty(m, n)
    absent = flat.new_empty(1)
    block_m, block_n, block_k = blocks
    if m and n:
        forward_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
            flat, weight.to(flat.dtype).contiguous(), s, b,
            absent if bias is None else bias.to(flat.dtype).contiguous(),
            absent if out_mask is None else out_mask.to(flat.dtype).contiguous(),
            absent if in_mask is None else in_mask.to(flat.dtype).contiguous(),
            y, m, n, k,
            R=rank, HAS_BIAS=bias is not None, HAS_OUT_MASK=out_mask is not None,
            HAS_IN_MASK=in_mask is not None, WHOLE=whole,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n)
