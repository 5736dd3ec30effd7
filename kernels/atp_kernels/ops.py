"""Masked LoRA with its gradients, on whatever `backend` chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels import custom_ops as library
from atp_kernels import reference
from atp_kernels.autocast import compute_type
from atp_kernels.backend import on_triton
from atp_kernels.custom_ops import masked_gemm
from atp_kernels.reference import LoraLayer, Placement


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
    """As `reference.masked_lora_linear`, by the fastest path that has all the gradients asked for.

    bool masks are a fixed decision: what they remove is skipped. A bitsandbytes 4-bit weight is
    dequantized first. Under autocast it computes in autocast's type.
    """
    weight = dense_weight(weight)
    if on_triton(x):
        return fused_masked_lora(
            x, weight, lora_a, lora_b, bias, out_mask, in_mask, scaling, placement
        )
    masks = [mask for mask in (out_mask, in_mask) if mask is not None]
    fixed = bool(masks) and all(mask.dtype == torch.bool for mask in masks)
    function = reference.skipping_lora_linear if fixed else reference.masked_lora_linear
    return function(
        x,
        weight,
        lora_a,
        lora_b,
        bias=bias,
        out_mask=out_mask,
        in_mask=in_mask,
        scaling=scaling,
        placement=placement,
    )


def dense_weight(weight: Tensor) -> Tensor:
    """The weight itself, or a bitsandbytes 4-bit one dequantized (before the kernel, not in it: the
    product then runs at the full rate of the tensor cores)."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def fused_masked_lora(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    out_mask: Tensor | None,
    in_mask: Tensor | None,
    scaling: float,
    placement: Placement,
) -> Tensor:
    """`masked_lora_linear` through the registered operators, whichever backend they run on."""
    kind = compute_type(x)
    parts = [None if t is None else t.to(kind) for t in (weight, lora_a, lora_b, bias)]
    # flatten(0, -2) of a vector's x [K] would fail: reshape does both.
    flat = x.reshape(-1, x.shape[-1]).to(kind)
    y: Tensor = _MaskedLora.apply(flat, *parts, out_mask, in_mask, scaling, placement == "whole")
    return y.view(*x.shape[:-1], y.shape[-1])


class _MaskedLora(torch.autograd.Function):
    """Both directions are `masked_gemm`, W read one way or the other (see masked_lora.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        out_mask: Tensor | None,
        in_mask: Tensor | None,
        scaling: float,
        whole: bool,
    ) -> Tensor:
        s = scaling * (_masked(x, in_mask if whole else None) @ lora_a.T)
        ctx.save_for_backward(x, weight, lora_a, lora_b, bias, out_mask, in_mask, s)
        ctx.scaling, ctx.whole = scaling, whole
        y, _ = masked_gemm(x, weight, s, lora_b, bias, out_mask, in_mask, whole, None)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, a, b, bias, out_mask, in_mask, s = ctx.saved_tensors
        whole = ctx.whole
        wants_x, wants_w, wants_a, wants_b, wants_bias, wants_out, wants_in = ctx.needs_input_grad[
            :7
        ]
        dx = dw = da = db = d_bias = d_out = d_in = None
        low_dy = _masked(dy, out_mask if whole else None)
        d = ctx.scaling * (low_dy @ b)
        if wants_x or wants_in:
            other = x if wants_in else None
            dx, d_in = masked_gemm(dy, weight.T, d, a.T, None, in_mask, out_mask, whole, other)
        if wants_a:
            da = d.T @ _masked(x, in_mask if whole else None)
        if wants_b:
            db = low_dy.T @ s
        if wants_w:
            dw = _masked(dy, out_mask).T @ _masked(x, in_mask)
        if wants_bias:
            d_bias = _masked(dy, out_mask).sum(0)
        if wants_out:
            _, d_out = masked_gemm(x, weight, s, b, bias, out_mask, in_mask, whole, dy)
        d_out = d_out.to(out_mask.dtype) if d_out is not None else None
        d_in = d_in.to(in_mask.dtype) if wants_in and d_in is not None else None
        return dx if wants_x else None, dw, da, db, d_bias, d_out, d_in, None, None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.to(x.dtype)


class _MaskedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(e, u, mask)
        return library.masked_swiglu(e, u, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        e, u, mask = ctx.saved_tensors
        de, du, d_mask = library.masked_swiglu_backward(gradients[0], e, u, mask)
        return de, du, d_mask.to(mask.dtype) if ctx.needs_input_grad[2] else None


def masked_swiglu(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """mask * silu(e) * u: e, u [..., N], mask [N], whose gradient is reduced in the backward."""
    flat: Tensor = _MaskedSwiglu.apply(e.flatten(0, -2), u.flatten(0, -2), mask)
    return flat.view(e.shape)


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
    all three products. base: the mask stands on the frozen products alone.
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
