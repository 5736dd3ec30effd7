"""mask * silu(e) * u with every gradient, the mask's too.

Forward and backward are registered with torch.library: torch.compile keeps them whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import on_triton


def masked_swiglu(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """mask * silu(e) * u: e, u [..., N], mask [N], whose gradient is reduced in the backward."""
    flat: Tensor = _MaskedSwiglu.apply(e.flatten(0, -2), u.flatten(0, -2), mask)
    return flat.view(e.shape)


class _MaskedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(e, u, mask)
        return swiglu_forward(e, u, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        e, u, mask = ctx.saved_tensors
        de, du, d_mask = swiglu_backward(gradients[0], e, u, mask)
        return de, du, d_mask.to(mask.dtype) if ctx.needs_input_grad[2] else None


@torch.library.custom_op(
    "atp::masked_swiglu", mutates_args=(), schema="(Tensor e, Tensor u, Tensor mask) -> Tensor"
)
def swiglu_forward(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """As `reference.masked_swiglu`."""
    if on_triton(e):
        from atp_kernels import swiglu_triton

        mask = mask.to(e.dtype).contiguous()
        return swiglu_triton.swiglu_forward(e.contiguous(), u.contiguous(), mask)
    return reference.masked_swiglu(e, u, mask).contiguous()


@swiglu_forward.register_fake
def _(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    return e.new_empty(e.shape)


@torch.library.custom_op(
    "atp::masked_swiglu_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor e, Tensor u, Tensor mask) -> (Tensor, Tensor, Tensor)",
)
def swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.masked_swiglu_backward`."""
    if on_triton(e):
        from atp_kernels import swiglu_triton

        dh, e, u, mask = (t.contiguous() for t in (dh, e, u, mask.to(e.dtype)))
        return swiglu_triton.swiglu_backward(dh, e, u, mask)
    de, du, d_mask = reference.masked_swiglu_backward(dh, e, u, mask)
    return de.contiguous(), du.contiguous(), d_mask


@swiglu_backward.register_fake
def _(dh: Tensor, e: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(e.dtype, torch.float32)
    return e.new_empty(e.shape), e.new_empty(e.shape), e.new_empty(e.shape[1], dtype=wide)
