"""The operators as torch.library knows them: schema, implementation by backend, fake.

Opaque to the compiler: torch.compile keeps them whole, without a graph break.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import on_triton


@torch.library.custom_op(
    "atp::masked_gemm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor s, Tensor b, Tensor? bias, Tensor? out_mask, "
    "Tensor? in_mask, bool whole, Tensor? other) -> (Tensor, Tensor)",
)
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
    """As `reference.masked_gemm`; in Triton a bool mask is skipped, not multiplied."""
    if on_triton(x):
        from atp_kernels import masked_gemm as masked_lora

        return masked_lora.masked_gemm(x, weight, s, b, bias, out_mask, in_mask, whole, other)
    return reference.masked_gemm(x, weight, s, b, bias, out_mask, in_mask, whole, other)


@masked_gemm.register_fake
def _(
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
    wide = torch.promote_types(x.dtype, torch.float32)
    size = 0 if other is None else weight.shape[0]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(size, dtype=wide)


@torch.library.custom_op(
    "atp::masked_swiglu", mutates_args=(), schema="(Tensor e, Tensor u, Tensor mask) -> Tensor"
)
def masked_swiglu(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """As `reference.masked_swiglu`."""
    if on_triton(e):
        from atp_kernels import swiglu

        return swiglu.swiglu_forward(e.contiguous(), u.contiguous(), mask.to(e.dtype).contiguous())
    return reference.masked_swiglu(e, u, mask).contiguous()


@masked_swiglu.register_fake
def _(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    return e.new_empty(e.shape)


@torch.library.custom_op(
    "atp::masked_swiglu_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor e, Tensor u, Tensor mask) -> (Tensor, Tensor, Tensor)",
)
def masked_swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.masked_swiglu_backward`."""
    if on_triton(e):
        from atp_kernels import swiglu

        return swiglu.swiglu_backward(
            dh.contiguous(), e.contiguous(), u.contiguous(), mask.to(e.dtype).contiguous()
        )
    de, du, d_mask = reference.masked_swiglu_backward(dh, e, u, mask)
    return de.contiguous(), du.contiguous(), d_mask


@masked_swiglu_backward.register_fake
def _(dh: Tensor, e: Tensor, u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(e.dtype, torch.float32)
    return e.new_empty(e.shape), e.new_empty(e.shape), e.new_empty(e.shape[1], dtype=wide)
