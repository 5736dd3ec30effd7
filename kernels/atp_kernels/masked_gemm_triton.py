"""Triton: `masked_gemm`, one product for forward and backward of `masked_lora_linear`.

Forward and gradient of x have the same form, W read one way or the other:

    y  = om * (W (im * x) + bias) + S B^T        S = s x A^T
    dx = im * (W^T (om * dy))     + D A          D = s dy B

(base placement; under `whole` the low-rank product stands inside the mask and S, D read what is
masked.) S or D is made first (rank r, one read); the product's accumulator then takes the low-rank
term, so that neither is written out and read again (the split of LoRAFusion, arXiv 2510.00206).

A bool mask is a fixed decision. It becomes a list, kept indices first, and a count, both on the
device: tiles past the count run no step of the loop, and the loop ends at the count. Nothing is
read back to the host, so that a step can be captured in a CUDA graph. Rows are gathered by the
kernel. What is contiguous along the inner dimension is put in the list's order before, zero past
the count: a mask of the count's (odd) length in the loop's loads was seen to leave it without one
asynchronous load.

A float mask is multiplied. Its gradient is reduced in the epilogue of the same product, tile by
tile into partial sums, which are then added in a fixed order: deterministic, no atomics.

Legend: x [M, K], w [N, K] by strides, s [M, R], b [N, R] by strides; pointers end in `_ptr`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Compiled for every target within the budgets of tests/atp_kernels/budgets.json; not tuned on a GPU
# yet (docs/kernels.md has what a step takes there).
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
# fp32 runs without tensor cores (exact, no tf32): larger tiles were seen to spill 2 KB a thread.
BLOCKS_FP32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
NUM_WARPS, NUM_STAGES = 8, 3
# Of the rank, at a time: three stacked LoRAs of rank 64 would not fit into shared memory at once.
LARGEST_BLOCK_R = 64


@triton.jit
def _add_low_rank(  # type: ignore[no-untyped-def]
    y, s_ptr, b_ptr, rows, columns, within, M, stride_bn, stride_br,
    R: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y + S B^T in y's own accumulator: a second one would not fit into registers."""
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        rank = first + tl.arange(0, BLOCK_R)
        s = tl.load(
            s_ptr + rows.to(tl.int64)[:, None] * R + rank[None, :],
            mask=rows[:, None] < M, other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + columns.to(tl.int64)[:, None] * stride_bn + rank[None, :] * stride_br,
            mask=within[:, None], other=0.0,
        )  # fmt: skip
        y = tl.dot(s, tl.trans(b), y, input_precision="ieee")
    return y


@triton.jit
def masked_gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, out_mask_ptr,
    out_order_ptr, out_count_ptr, in_order_ptr, in_count_ptr,
    other_ptr, y_ptr, partial_ptr,
    M, N, K, stride_wn, stride_wk, stride_bn, stride_br,
    R: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OUT_MASK: tl.constexpr,
    OUT_LIST: tl.constexpr, IN_LIST: tl.constexpr, GATHER_W: tl.constexpr,
    WHOLE: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N]; with REDUCE also partial [tiles of M, N], the sums of other * y before its mask."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    columns = places
    k_end = K
    if IN_LIST:
        k_end = tl.load(in_count_ptr)
    kept = places < N
    if OUT_LIST:
        out_count = tl.load(out_count_ptr)
        kept = places < out_count
        columns = tl.load(out_order_ptr + places, mask=places < N, other=0)
        # A bound, not a branch: a branch inside the loop would end its pipelining.
        k_end = tl.where(tl.program_id(1) * BLOCK_N < out_count, k_end, 0)
    # Offsets in 64 bits: M * N passes 2**31 on long batches.
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
    w_rows = w_ptr + columns.to(tl.int64)[:, None] * stride_wn
    frozen = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k_end, BLOCK_K):
        place = start + inner
        live = place < K
        k = place
        if GATHER_W:
            k = tl.load(in_order_ptr + place, mask=live, other=0)
        x = tl.load(x_rows + place[None, :], mask=(rows[:, None] < M) & live[None, :], other=0.0)
        w = tl.load(
            w_rows + k.to(tl.int64)[None, :] * stride_wk,
            mask=kept[:, None] & live[None, :], other=0.0,
        )  # fmt: skip
        frozen = tl.dot(x, tl.trans(w), frozen, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=places < N, other=0.0)
        frozen += bias.to(tl.float32)[None, :]
    y = frozen
    if WHOLE:
        y = _add_low_rank(
            y, s_ptr, b_ptr, rows, columns, places < N, M, stride_bn, stride_br, R, BLOCK_R
        )
    inside = (rows[:, None] < M) & (places[None, :] < N)
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if REDUCE:
        other = tl.load(other_ptr + offsets, mask=inside, other=0.0)
        partial = tl.sum(y * other.to(tl.float32), axis=0)
        tl.store(
            partial_ptr + tl.program_id(0).to(tl.int64) * N + columns, partial, mask=places < N
        )
    if HAS_OUT_MASK:
        out_mask = tl.load(out_mask_ptr + columns, mask=places < N, other=0.0)
        y = y * out_mask.to(tl.float32)[None, :]
    if OUT_LIST:
        y = tl.where(kept[None, :], y, 0.0)
    if not WHOLE:
        y = _add_low_rank(
            y, s_ptr, b_ptr, rows, columns, places < N, M, stride_bn, stride_br, R, BLOCK_R
        )
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def masked_gemm(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    whole: bool,
    other: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], mask gradient [N] or [0]) from x [M, K], weight [N, K], s [M, r], b [N, r].

    weight and b may be transposed views; bool masks are lists, float masks are multiplied.
    other [M, N]: its product with the unmasked y is summed over M.
    """
    m, k, n = len(x), x.shape[1], len(weight)
    kind = x.dtype
    s, b, block_r = _padded(s, b)
    s, b = s.to(kind).contiguous(), b.to(kind)
    y = x.new_empty(m, n)
    absent = x.new_empty(1)
    blocks = BLOCKS_FP32 if kind == torch.float32 else BLOCKS
    tiles = triton.cdiv(m, blocks["BLOCK_M"])
    partial = x.new_empty((tiles, n) if other is not None else (0, 0), dtype=torch.float32)
    out_list, in_list = _list_of(out_mask), _list_of(in_mask)
    x, weight, gather_w = _inner(x, weight.to(kind), in_mask, in_list)

    def given(value: Tensor | None) -> Tensor:
        return absent if value is None else value.to(kind).contiguous()

    if m and n:
        multiplied = out_mask if out_list is None else None
        masked_gemm_kernel[(tiles, triton.cdiv(n, blocks["BLOCK_N"]))](
            x.contiguous(), weight, s, b, given(bias), given(multiplied),
            *(out_list or (absent, absent)), *(in_list or (absent, absent)),
            given(other), y, partial if other is not None else absent,
            m, n, k, weight.stride(0), weight.stride(1), b.stride(0), b.stride(1),
            R=s.shape[1], BLOCK_R=block_r,
            HAS_BIAS=bias is not None, HAS_OUT_MASK=multiplied is not None,
            OUT_LIST=out_list is not None, IN_LIST=in_list is not None, GATHER_W=gather_w,
            WHOLE=whole, REDUCE=other is not None,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, **blocks,
        )  # fmt: skip
    return y, partial.sum(0)


def _padded(s: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """s [M, R] and b [N, R] with R a multiple of the kernel's block, and that block."""
    rank = s.shape[1]
    block = min(LARGEST_BLOCK_R, max(16, triton.next_power_of_2(rank)))
    if missing := -rank % block:  # padding by nothing would be a copy
        s, b = (F.pad(t, (0, missing)) for t in (s, b))
    return s, b, block


def _list_of(mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Of a bool mask, on its device: indices, kept ones first, int32; and how many are kept."""
    if mask is None or mask.dtype != torch.bool:
        return None
    order = torch.argsort(mask.logical_not(), stable=True).to(torch.int32)
    return order, mask.sum(dtype=torch.int32)


def _inner(
    x: Tensor, weight: Tensor, mask: Tensor | None, listed: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, bool]:
    """x and W under a mask over K, and whether the kernel is to gather W along K."""
    if mask is None:
        return x, weight, False
    if listed is None:
        # Not in the loop: what passes through registers there cannot stay in flight, and on sm_90
        # the compiler then waits for every single wgmma.
        return x * mask.to(x.dtype), weight, False
    order, _ = listed
    x = x.index_select(1, order) * mask.index_select(0, order).to(x.dtype)
    if weight.stride(0) == 1:
        return x, weight, True
    return x, weight.index_select(1, order), False
