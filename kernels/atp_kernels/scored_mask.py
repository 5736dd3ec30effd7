"""A decision on what o_proj or down_proj reads: its gradient and the importance in one pass.

Registered with torch.library: torch.compile keeps it whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import fuses


def mask_scored(z: Tensor, mask: Tensor, *, score: Tensor | None = None) -> Tensor:
    """mask * z: z [..., N], mask [size] over structures of N / size columns side by side.

    score [size], if given, takes the importance of every structure as the backward passes: the sum
    over tokens of (sum of |z dL/dy| over its columns)^2 (`atp_edge.decision.importance`).
    """
    y: Tensor = _ScoredMask.apply(z.flatten(0, -2), mask, score)
    return y.view(z.shape)


class _ScoredMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor, score: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, mask)
        ctx.score = score
        return z * mask.to(z.dtype).repeat_interleave(z.shape[1] // len(mask))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, mask = ctx.saved_tensors
        dz, d_mask, score = scored_mask_backward(z, gradients[0], mask)
        if ctx.score is not None:
            ctx.score.add_(score)
        return dz, d_mask.to(mask.dtype) if ctx.needs_input_grad[1] else None, None


@torch.library.custom_op(
    "atp::scored_mask_backward",
    mutates_args=(),
    schema="(Tensor z, Tensor g, Tensor mask) -> (Tensor, Tensor, Tensor)",
)
def scored_mask_backward(z: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scored_mask_backward`."""
    if fuses(z):
        from atp_kernels import scored_mask_triton

        z, g = (x if x.stride(1) == 1 else x.contiguous() for x in (z, g))
        return scored_mask_triton.scored_mask_backward(z, g, mask.contiguous())
    dz, d_mask, score = reference.scored_mask_backward(z, g, mask)
    return dz.contiguous(), d_mask, score


@scored_mask_backward.register_fake
def _(z: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(z.dtype, torch.float32)
    sums = [z.new_empty(len(mask), dtype=wide) for _ in range(2)]
    return g.new_empty(g.shape), sums[0], sums[1]
