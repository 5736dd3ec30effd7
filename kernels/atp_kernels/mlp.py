"""A gated MLP with LoRA under a mask over its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from atp_kernels.masked_lora import masked_lora_linear
from atp_kernels.reference import LoraLayer, Placement
from atp_kernels.swiglu import masked_swiglu


def masked_swiglu_mlp(
    x: Tensor,
    gate: LoraLayer,
    up: LoraLayer,
    down: LoraLayer,
    mask: Tensor,
    *,
    scaling: float = 1.0,
    placement: Placement = "whole",
) -> Tensor:
    """down(mask * silu(gate(x)) * up(x)): x [..., H] -> [..., H], mask [I] over the channels.

    whole: the mask's gradient is reduced in the backward of the SwiGLU; a bool mask is skipped in
    all three products. base: the mask stands on the frozen products only.
    """
    fixed = mask.dtype == torch.bool
    outer = mask if fixed or placement == "base" else None

    def layer(
        z: Tensor, part: LoraLayer, out_mask: Tensor | None, in_mask: Tensor | None
    ) -> Tensor:
        return masked_lora_linear(
            z,
            part.weight,
            part.lora_a,
            part.lora_b,
            bias=part.bias,
            out_mask=out_mask,
            in_mask=in_mask,
            scaling=scaling,
            placement=placement,
        )

    e, u = layer(x, gate, outer, None), layer(x, up, outer, None)
    on_h = torch.ones_like(mask) if placement == "base" else mask
    return layer(masked_swiglu(e, u, on_h), down, None, outer)
