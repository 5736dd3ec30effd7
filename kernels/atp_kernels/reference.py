"""Masked LoRA in plain torch: what the kernels mean, and the path that runs without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Placement = Literal["base", "whole"]


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """weight [N, K], lora_a [r, K], lora_b [N, r], bias [N]."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    scaling: float = 1.0,
    placement: Placement = "base",
) -> Tensor:
    """A linear layer with LoRA under a mask: x [..., K] -> [..., N].

    weight [N, K], lora_a [r, K], lora_b [N, r], bias and out_mask [N], in_mask [K].
    base:  y = out_mask * (W (in_mask * x) + bias) + scaling * B A x
    whole: y = out_mask * (W z + bias + scaling * B A z), z = in_mask * x
    (ATP, arXiv 2412.14426, section 3.3.)
    """
    masked_x = x if in_mask is None else x * in_mask.to(x.dtype)
    lora_x = x if placement == "base" else masked_x
    frozen = F.linear(masked_x, weight, bias)
    low_rank = scaling * F.linear(F.linear(lora_x, lora_a), lora_b)
    if out_mask is None:
        return frozen + low_rank
    mask = out_mask.to(frozen.dtype)
    return frozen * mask + low_rank if placement == "base" else (frozen + low_rank) * mask


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
    """The product that forward and backward of a masked layer share: (y [M, N], reduced [N]).

    y = out_mask * (W (in_mask * x) + bias) + S B^T, the low-rank term inside the mask if `whole`.
    other [M, N]: reduced is the sum over M of other * (y before out_mask, without what is outside
    of it); None: reduced is empty.
    """
    masked_x = x if in_mask is None else x * in_mask.to(x.dtype)
    y = F.linear(masked_x, weight, bias)
    low_rank = F.linear(s, b)
    if whole:
        y = y + low_rank
    wide = torch.promote_types(x.dtype, torch.float32)
    reduced = x.new_empty(0, dtype=wide) if other is None else (y.to(wide) * other.to(wide)).sum(0)
    if out_mask is not None:
        y = y * out_mask.to(y.dtype)
    return (y if whole else y + low_rank), reduced


def masked_swiglu(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """mask * silu(e) * u: e, u [M, N], mask [N]."""
    return F.silu(e) * u * mask.to(e.dtype)


def masked_swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(de, du [M, N], dmask [N]) of `masked_swiglu`."""
    sigmoid = e.sigmoid()
    silu = e * sigmoid
    wide = torch.promote_types(e.dtype, torch.float32)
    d_mask = (dh.to(wide) * silu.to(wide) * u.to(wide)).sum(0)
    dh = dh * mask.to(dh.dtype)
    return dh * u * (sigmoid + silu * (1 - sigmoid)), dh * silu, d_mask
