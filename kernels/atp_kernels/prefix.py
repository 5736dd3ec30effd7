"""LoRA under a fixed decision, in torch: what is kept stands first, and shapes carry the decision.

    y[:, :n] = x[:, :k] W^T + bias       W [n, k], the kept part of the frozen weight
    y       += s (x A^T) B^T             A [r, K], B [N, r], with n <= N and k <= K

Rows n..N of B and columns k..K of A belong to structures that are removed but whose LoRA is not
yet zero (mask placement `base`); under `whole` there are none. The products are exactly those of
a linear layer of the kept width, forward and backward: nothing is masked, scattered or padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def prefix_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """x [..., K] -> [..., N], as in the head of this file; gradients to all that asks for them.

    Under autocast it computes in autocast's type, like `torch.nn.functional.linear`.
    Raises ValueError when the weight is wider than x or than B.
    """
    if len(weight) > len(lora_b) or weight.shape[1] > x.shape[-1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit B {tuple(lora_b.shape)} and x [..., "
            f"{x.shape[-1]}]: expected at most as many rows as B and columns as x"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        x, weight, lora_a, lora_b = (t.to(kind) for t in (x, weight, lora_a, lora_b))
        bias = None if bias is None else bias.to(kind)
    y: Tensor = _PrefixLora.apply(x.flatten(0, -2), weight, lora_a, lora_b, bias, scaling)
    return y.unflatten(0, x.shape[:-1])


class _PrefixLora(torch.autograd.Function):
    """Saves x A^T; adds the low-rank products in place to the frozen ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        n, k = w.shape
        inner = x @ a.T  # [M, r]
        frozen = F.linear(x[:, :k], w, bias)
        if n == len(b):
            y = frozen.addmm_(inner, b.T, alpha=scaling)
        else:
            y = (inner * scaling) @ b.T
            y[:, :n] += frozen
        ctx.save_for_backward(x, w, a, b, inner)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, w, a, b, inner = ctx.saved_tensors
        wants_x, wants_w, wants_a, wants_b, wants_bias, _ = ctx.needs_input_grad
        n, k = w.shape
        dx = dw = da = db = dbias = None
        d_inner = (dy @ b).mul_(ctx.scaling) if wants_x or wants_a else None
        if wants_x:
            assert d_inner is not None
            dx = dy[:, :n] @ w
            if k == x.shape[1]:
                dx.addmm_(d_inner, a)
            else:
                frozen, dx = dx, d_inner @ a
                dx[:, :k] += frozen
        if wants_w:
            dw = dy[:, :n].T @ x[:, :k]
        if wants_a:
            assert d_inner is not None
            da = d_inner.T @ x
        if wants_b:
            db = (dy.T @ inner).mul_(ctx.scaling)
        if wants_bias:
            dbias = dy[:, :n].sum(0)
        return dx, dw, da, db, dbias, None
