"""Triton: q, k and v out of their one product, q and k turned by RoPE; and all the way back.

A program has some tokens of one head. Legend: packed [M, (heads + 2 groups) D]; q [M, heads, D];
k, v [M, groups, D]; cosine, sine [P, D], of which token m reads row m % P.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Not measured yet on a GPU.
BLOCK_M = 32


@triton.jit
def rope_kernel(  # type: ignore[no-untyped-def]
    packed_ptr, q_ptr, k_ptr, v_ptr, cosine_ptr, sine_ptr, M, P, heads, groups, stride,
    D: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """HALF: D / 2, up to a power of two. BACKWARD: from q, k, v into packed, by the transpose."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, HALF)
    inside = (rows[:, None] < M) & (half[None, :] < D // 2)
    wide = rows.to(tl.int64)[:, None]
    packed = packed_ptr + wide * stride + head * D + half[None, :]
    apart = q_ptr + (wide * heads + head) * D + half[None, :]
    if head >= heads:
        apart = k_ptr + (wide * groups + head - heads) * D + half[None, :]
    if head >= heads + groups:
        apart = v_ptr + (wide * groups + head - heads - groups) * D + half[None, :]
    source, into = packed, apart
    if BACKWARD:
        source, into = apart, packed
    one = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    if head < heads + groups:
        turn = (rows % P).to(tl.int64)[:, None] * D + half[None, :]
        cosine_one = tl.load(cosine_ptr + turn, mask=inside, other=0.0).to(tl.float32)
        cosine_two = tl.load(cosine_ptr + turn + D // 2, mask=inside, other=0.0).to(tl.float32)
        sine_one = tl.load(sine_ptr + turn, mask=inside, other=0.0).to(tl.float32)
        sine_two = tl.load(sine_ptr + turn + D // 2, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            sine_one, sine_two = -sine_two, -sine_one
        first = one * cosine_one - two * sine_one
        two = two * cosine_two + one * sine_two
        one = first
    tl.store(into, one.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(into + D // 2, two.to(q_ptr.dtype.element_ty), mask=inside)


def rope(
    packed: Tensor, cosine: Tensor, sine: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.rope`; packed may be rows of a wider tensor."""
    m, size = len(packed), cosine.shape[1]
    q, k, v = (packed.new_empty(m, n, size) for n in (heads, groups, groups))
    _launch(packed, q, k, v, cosine, sine, backward=False)
    return q, k, v


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As `reference.rope_backward`, of contiguous inputs."""
    m, heads, size = dq.shape
    packed = dq.new_empty(m, (heads + 2 * dk.shape[1]) * size)
    _launch(packed, dq, dk, dv, cosine, sine, backward=True)
    return packed


def _launch(
    packed: Tensor, q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool
) -> None:
    m, heads, size = q.shape
    groups = k.shape[1]
    if q.numel():
        rope_kernel[(triton.cdiv(m, BLOCK_M), heads + 2 * groups)](
            packed, q, k, v, cosine, sine, m, len(cosine), heads, groups, packed.stride(0),
            D=size, HALF=triton.next_power_of_2(size // 2), BACKWARD=backward, BLOCK_M=BLOCK_M,
        )  # fmt: skip
