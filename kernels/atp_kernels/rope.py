"""q, k and v out of their one product, q and k turned by RoPE, in one launch each way.

Both ways are registered with torch.library: torch.compile keeps them whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import fuses


def rope_qkv(
    packed: Tensor, cosine: Tensor, sine: Tensor, *, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """packed [B, T, (heads + 2 groups) D] -> q [B, heads, T, D], k and v [B, groups, T, D].

    cosine, sine [1 or B, T, D], as transformers' rotary embedding gives them.
    """
    b, t, _ = packed.shape
    turns = [x.reshape(-1, x.shape[-1]) for x in (cosine, sine)]
    apart = _Rope.apply(packed.flatten(0, 1), *turns, heads, groups)
    q, k, v = (x.view(b, t, *x.shape[1:]).transpose(1, 2) for x in apart)
    return q, k, v


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, cosine: Tensor, sine: Tensor, heads: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return rope(packed, cosine, sine, heads, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = gradients
        return rope_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


@torch.library.custom_op(
    "atp::rope",
    mutates_args=(),
    schema="(Tensor packed, Tensor cosine, Tensor sine, SymInt heads, SymInt groups) "
    "-> (Tensor, Tensor, Tensor)",
)
def rope(
    packed: Tensor, cosine: Tensor, sine: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.rope`."""
    if fuses(packed):
        from atp_kernels import rope_triton

        packed = packed if packed.stride(1) == 1 else packed.contiguous()
        return rope_triton.rope(packed, cosine.contiguous(), sine.contiguous(), heads, groups)
    q, k, v = reference.rope(packed, cosine, sine, heads, groups)
    return q.contiguous(), k.contiguous(), v.clone(memory_format=torch.contiguous_format)


@rope.register_fake
def _(
    packed: Tensor, cosine: Tensor, sine: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    m, size = packed.shape[0], cosine.shape[1]
    q, k, v = (packed.new_empty(m, n, size) for n in (heads, groups, groups))
    return q, k, v


@torch.library.custom_op(
    "atp::rope_backward",
    mutates_args=(),
    schema="(Tensor dq, Tensor dk, Tensor dv, Tensor cosine, Tensor sine) -> Tensor",
)
def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As `reference.rope_backward`."""
    if fuses(dq):
        from atp_kernels import rope_triton

        dq, dk, dv, cosine, sine = (x.contiguous() for x in (dq, dk, dv, cosine, sine))
        return rope_triton.rope_backward(dq, dk, dv, cosine, sine)
    return reference.rope_backward(dq, dk, dv, cosine, sine).contiguous()


@rope_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])
