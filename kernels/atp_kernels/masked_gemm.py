"""The matrix product that forward and gradient of a masked LoRA layer share.

Registered with torch.library: torch.compile keeps it whole, without a graph break.
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
        from atp_kernels import masked_gemm_triton

        gemm = masked_gemm_triton.masked_gemm
    else:
        gemm = reference.masked_gemm
    return gemm(x, weight, s, b, bias, out_mask, in_mask, whole, other)


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
