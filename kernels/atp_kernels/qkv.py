"""q, k and v of an attention with LoRA under a mask over its KV groups, in one product."""

from __future__ import annotations

import torch
from torch import Tensor

from atp_kernels.masked_lora import masked_lora_linear
from atp_kernels.reference import Placement


def masked_qkv(
    x: Tensor,
    weight: Tensor,
    loras: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    mask: Tensor | None,
    *,
    group_heads: int,
    head_dim: int,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    placement: Placement = "base",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in one product that reads x once: x [..., H] -> [..., heads * head_dim] and twice
    [..., groups * head_dim].

    weight: q, k and v stacked by rows (once, it is frozen). loras: (A, B) of q, k, v. mask [groups]
    over the KV groups, spread over their heads; None: nothing is masked.
    """
    spread = None
    if mask is not None:
        kv_mask = mask.repeat_interleave(head_dim)
        spread = torch.cat([mask.repeat_interleave(group_heads * head_dim), kv_mask, kv_mask])
    y = masked_lora_linear(
        x,
        weight,
        torch.cat([a for a, _ in loras]),
        torch.block_diag(*(b for _, b in loras)),
        bias=bias,
        out_mask=spread,
        scaling=scaling,
        placement=placement,
    )
    q, k, v = y.split([len(b) for _, b in loras], -1)
    return q, k, v
