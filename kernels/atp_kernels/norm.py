"""RMS norm with the residual before it, written where the products read it: [x | x A^T | 0].

Forward and backward are registered with torch.library: torch.compile keeps them whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import fuses
from atp_kernels.joined_lora import with_room


def fused_norm(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    kind: torch.dtype,
    a: Tensor | None = None,
    room: int = 0,
) -> tuple[Tensor, Tensor]:
    """(stream + delta, x): x [..., K] in `kind`, the RMS norm of it, times weight [K], which takes
    no gradient.

    a [r, K]: x then has x A^T beside it (`joined_lora.with_room`), for products whose buffer has
    `room` columns more than x.
    """
    shape = stream.shape
    flat = stream.reshape(-1, shape[-1])
    more = None if delta is None else delta.reshape(-1, shape[-1])
    new, whole = _Norm.apply(flat, more, weight, eps, a, room, kind)
    x = with_room(whole, shape[:-1], shape[-1])
    return (stream if delta is None else new.view(shape)), x


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        eps: float,
        a: Tensor | None,
        room: int,
        kind: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        new, whole, root = norm_into(stream, delta, weight, eps, a, room, kind)
        ctx.save_for_backward(stream if delta is None else new, weight, root)
        ctx.delta = None if delta is None else delta.dtype
        return new, whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_new, d_whole = gradients
        stream, weight, root = ctx.saved_tensors
        beside = None if ctx.delta is None else d_new
        found = norm_backward(d_whole[:, : stream.shape[1]], stream, weight, root, beside)
        d_delta = None if ctx.delta is None else found.to(ctx.delta)
        return found, d_delta, None, None, None, None, None


@torch.library.custom_op(
    "atp::norm_into",
    mutates_args=(),
    schema="(Tensor stream, Tensor? delta, Tensor weight, float eps, Tensor? a, SymInt room, "
    "ScalarType kind) -> (Tensor, Tensor, Tensor)",
)
def norm_into(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    room: int,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_into`; where delta is None, the new stream is empty."""
    if fuses(stream):
        from atp_kernels import norm_triton

        stream, weight = stream.contiguous(), weight.contiguous()
        delta = None if delta is None else delta.contiguous()
        a = None if a is None else a.to(kind).contiguous()
        return norm_triton.norm_into(stream, delta, weight, eps, a, room, kind)
    a = None if a is None else a.to(kind)
    new, whole, root = reference.norm_into(stream, delta, weight, eps, a, room, kind)
    return new.new_empty(0, 0) if delta is None else new, whole.contiguous(), root


@norm_into.register_fake
def _(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    room: int,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    m, k = stream.shape
    wide = torch.promote_types(stream.dtype, torch.float32)
    into = stream.dtype if delta is None else torch.promote_types(stream.dtype, delta.dtype)
    new = stream.new_empty((0, 0) if delta is None else (m, k), dtype=into)
    return new, stream.new_empty(m, k + room, dtype=kind), stream.new_empty(m, dtype=wide)


@torch.library.custom_op(
    "atp::norm_backward",
    mutates_args=(),
    schema="(Tensor dx, Tensor stream, Tensor weight, Tensor root, Tensor? d_stream) -> Tensor",
)
def norm_backward(
    dx: Tensor, stream: Tensor, weight: Tensor, root: Tensor, d_stream: Tensor | None
) -> Tensor:
    """As `reference.norm_backward`."""
    if fuses(stream):
        from atp_kernels import norm_triton

        dx = dx if dx.stride(1) == 1 else dx.contiguous()
        beside = None if d_stream is None else d_stream.contiguous()
        return norm_triton.norm_backward(dx, stream, weight.contiguous(), root, beside)
    return reference.norm_backward(dx, stream, weight, root, d_stream).contiguous()


@norm_backward.register_fake
def _(dx: Tensor, stream: Tensor, weight: Tensor, root: Tensor, d_stream: Tensor | None) -> Tensor:
    return stream.new_empty(stream.shape)
