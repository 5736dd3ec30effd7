"""Triton: of y = mask * z the gradient of z, of the mask, and the importance, in one pass.

A program has some tokens of one structure. Partial sums are added afterwards in a fixed order.
Legend: z, g, dz [M, N] of rows `stride` apart; mask [size]; a structure is WIDTH = N / size
columns side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured yet on a GPU.
BLOCK_M, LARGEST_BLOCK_W = 32, 128


@triton.jit
def scored_mask_kernel(  # type: ignore[no-untyped-def]
    z_ptr, g_ptr, mask_ptr, dz_ptr, partial_ptr, square_ptr, M, width, size, stride_z, stride_g,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dz, and of these tokens the sums of z g and of (sum of |z g|)^2."""
    structure = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    wide = rows.to(tl.int64)[:, None]
    kept = tl.load(mask_ptr + structure).to(tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    size_of = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, width, BLOCK_W):
        within = start + tl.arange(0, BLOCK_W)
        inside = (rows[:, None] < M) & (within[None, :] < width)
        columns = structure * width + within
        z = tl.load(z_ptr + wide * stride_z + columns[None, :], mask=inside, other=0.0)
        g = tl.load(g_ptr + wide * stride_g + columns[None, :], mask=inside, other=0.0)
        g = g.to(tl.float32)
        product = z.to(tl.float32) * g
        total += tl.sum(product, axis=1)
        size_of += tl.sum(tl.abs(product), axis=1)
        dz = (kept * g).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + wide * width * size + columns[None, :], dz, mask=inside)
    at = tl.program_id(0).to(tl.int64) * size + structure
    tl.store(partial_ptr + at, tl.sum(total, axis=0))
    tl.store(square_ptr + at, tl.sum(size_of * size_of, axis=0))


def scored_mask_backward(z: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scored_mask_backward`; z, g [M, N] may be rows of wider tensors."""
    (m, n), size = z.shape, len(mask)
    dz = g.new_empty(m, n)
    tiles = triton.cdiv(m, BLOCK_M)
    partial, square = (z.new_empty(tiles, size, dtype=torch.float32) for _ in range(2))
    if z.numel():
        width = n // size
        scored_mask_kernel[(tiles, size)](
            z, g, mask, dz, partial, square, m, width, size, z.stride(0), g.stride(0),
            BLOCK_M=BLOCK_M, BLOCK_W=min(LARGEST_BLOCK_W, triton.next_power_of_2(width)),
        )  # fmt: skip
    return dz, partial.sum(0), square.sum(0)
