"""A linear layer with LoRA under masks, with every gradient, the masks' too.

Three paths give the same values. Triton: both directions are `masked_gemm`, W read one way or the
other (the head of masked_gemm_triton.py has the formulas). Torch under bool masks: rows and columns
that are removed are not multiplied. Else: plain torch (reference.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atp_kernels import reference
from atp_kernels.autocast import compute_type
from atp_kernels.backend import backend_name, on_triton
from atp_kernels.compact_lora import prefix_lora_linears
from atp_kernels.masked_gemm import masked_gemm
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
    if out_mask is None and in_mask is None and backend_name() != "torch":
        layer = LoraLayer(weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)
        (y,) = prefix_lora_linears(x.unsqueeze(0), [layer], scaling=scaling)
        return y.squeeze(0)
    if on_triton(x):
        return fused_masked_lora(
            x, weight, lora_a, lora_b, bias, out_mask, in_mask, scaling, placement
        )
    masks = [mask for mask in (out_mask, in_mask) if mask is not None]
    fixed = bool(masks) and all(mask.dtype == torch.bool for mask in masks)
    # To skip, the host has to know how much: where it would wait for a device, it multiplies.
    fixed = fixed and backend_name() == "torch"
    function = skipping_lora_linear if fixed else reference.masked_lora_linear
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


def skipping_lora_linear(
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
    """`masked_lora_linear` under a fixed decision (bool masks): removed rows and columns are not
    multiplied, neither forward nor backward. Same values, same gradients.
    """
    columns = None if in_mask is None else in_mask.nonzero().squeeze(1)
    rows = None if out_mask is None else out_mask.nonzero().squeeze(1)
    kept_x = x if columns is None else _columns(x, columns)
    kept = weight if columns is None else weight.index_select(1, columns)
    kept = kept if rows is None else kept.index_select(0, rows)
    kept_bias = bias if bias is None or rows is None else bias.index_select(0, rows)
    frozen = F.linear(kept_x, kept, kept_bias)
    whole = placement == "whole"
    inner = F.linear(
        kept_x if whole else x,
        lora_a.index_select(1, columns) if whole and columns is not None else lora_a,
    )
    if rows is None:
        return frozen + scaling * F.linear(inner, lora_b)
    if whole:
        frozen = frozen + scaling * F.linear(inner, lora_b.index_select(0, rows))
        return _scatter(frozen, rows, len(weight))
    return scaling * F.linear(inner, lora_b) + _scatter(frozen, rows, len(weight))


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """[..., K] -> [..., kept]. On a CPU, indexing copies bf16 five times as fast as index_select,
    but its backward is slower."""
    if torch.is_grad_enabled() and x.requires_grad:
        return x.index_select(-1, columns)
    return x[..., columns]


def _scatter(kept: Tensor, rows: Tensor, size: int) -> Tensor:
    """[..., kept] -> [..., size], zero elsewhere."""
    out = kept.new_zeros(*kept.shape[:-1], size)
    return torch.index_copy(out, -1, rows, kept)


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
