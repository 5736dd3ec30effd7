"""mask * silu(e) * u with every gradient, the mask's too, and its importance.

Forward and backward are registered with torch.library: torch.compile keeps them whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import fuses
from atp_kernels.joined_lora import with_room


def masked_swiglu(e: Tensor, u: Tensor, mask: Tensor, *, score: Tensor | None = None) -> Tensor:
    """mask * silu(e) * u: e, u [..., N], mask [N], whose gradient is reduced in the backward.

    score [N], if given, takes the importance of every channel as the backward passes: the sum over
    tokens of (h dL/dh)^2, h before the mask (`atp_edge.decision.importance`).
    """
    return _Swiglu.apply(e.flatten(0, -2), u.flatten(0, -2), None, mask, None, 0, score).view(
        e.shape
    )


def plain_swiglu(e: Tensor, u: Tensor) -> Tensor:
    """silu(e) * u: e, u [..., N]."""
    shape = e.shape
    flat = (e.flatten(0, -2), u.flatten(0, -2))
    return _Swiglu.apply(*flat, None, None, None, 0, None).view(shape)


def swiglu_of_both(gate_up: Tensor, a: Tensor | None, room: int) -> Tensor:
    """silu(e) * u [..., N] of gate_up [..., 2 N]: e, then u.

    a [r, N]: h then has h A^T beside it (`joined_lora.with_room`).
    """
    n = gate_up.shape[-1] // 2
    whole = _Swiglu.apply(None, None, gate_up.flatten(0, -2), None, a, room, None)
    return with_room(whole, gate_up.shape[:-1], n)


class _Swiglu(torch.autograd.Function):
    """Either e and u, or both in one tensor, whose gradient is then one too."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor | None,
        u: Tensor | None,
        gate_up: Tensor | None,
        mask: Tensor | None,
        a: Tensor | None,
        room: int,
        score: Tensor | None,
    ) -> Tensor:
        ctx.together, ctx.score = gate_up is not None, score
        if gate_up is not None:
            e, u = gate_up.chunk(2, -1)
        assert e is not None
        assert u is not None
        ctx.save_for_backward(e, u, mask)
        return swiglu_forward(e, u, mask, a, room)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        e, u, mask = ctx.saved_tensors
        dh = gradients[0][:, : e.shape[1]]
        both, d_mask, score = swiglu_backward(dh, e, u, mask)
        if ctx.score is not None:
            ctx.score.add_(score)
        d_mask = d_mask.to(mask.dtype) if ctx.needs_input_grad[3] else None
        if ctx.together:
            return None, None, both, d_mask, None, None, None
        return *both.chunk(2, -1), None, d_mask, None, None, None


@torch.library.custom_op(
    "atp::masked_swiglu",
    mutates_args=(),
    schema="(Tensor e, Tensor u, Tensor? mask, Tensor? a=None, SymInt room=0) -> Tensor",
)
def swiglu_forward(
    e: Tensor, u: Tensor, mask: Tensor | None, a: Tensor | None = None, room: int = 0
) -> Tensor:
    """As `reference.masked_swiglu`."""
    if fuses(e):
        from atp_kernels import swiglu_triton

        mask = None if mask is None else mask.to(e.dtype).contiguous()
        a = None if a is None else a.to(e.dtype).contiguous()
        return swiglu_triton.swiglu_forward(_rows(e), _rows(u), mask, a, room)
    return reference.masked_swiglu(e, u, mask, a, room).contiguous()


@swiglu_forward.register_fake
def _(e: Tensor, u: Tensor, mask: Tensor | None, a: Tensor | None = None, room: int = 0) -> Tensor:
    return e.new_empty(e.shape[0], e.shape[1] + room)


@torch.library.custom_op(
    "atp::masked_swiglu_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor e, Tensor u, Tensor? mask) -> (Tensor, Tensor, Tensor)",
)
def swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.masked_swiglu_backward`; without a mask its sums are empty."""
    if fuses(e):
        from atp_kernels import swiglu_triton

        mask = None if mask is None else mask.to(e.dtype).contiguous()
        return swiglu_triton.swiglu_backward(_rows(dh), _rows(e), _rows(u), mask)
    both, d_mask, score = reference.masked_swiglu_backward(dh, e, u, mask)
    if mask is None:
        d_mask, score = (d_mask.new_empty(0) for _ in range(2))
    return both.contiguous(), d_mask, score


@swiglu_backward.register_fake
def _(dh: Tensor, e: Tensor, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(e.dtype, torch.float32)
    m, n = e.shape
    sums = [e.new_empty(0 if mask is None else n, dtype=wide) for _ in range(2)]
    return e.new_empty(m, 2 * n), sums[0], sums[1]


def _rows(x: Tensor) -> Tensor:
    """x [M, N] with its rows' elements side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
