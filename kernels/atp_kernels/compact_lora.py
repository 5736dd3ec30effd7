"""LoRA under a fixed decision, in torch: what is kept stands first, and shapes carry the decision.

    y[:, :n] = x[:, :k] W^T + bias       W [n, k], the kept part of the frozen weight
    y       += s (x A^T) B^T             A [r, K], B [N, r], with n <= N and k <= K

Rows n..N of B and columns k..K of A belong to structures that are removed but whose LoRA is not
yet zero (mask placement `base`); under `whole` there are none. The products are exactly those of
a linear layer of the kept width, forward and backward: nothing is masked, scattered or padded.

Layers that read one x (q, k, v; gate, up) are computed together: their A's make one product, and
the gradient of x is summed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atp_kernels.autocast import compute_type
from atp_kernels.reference import LoraLayer


def prefix_lora_linears(x: Tensor, layers: Sequence[LoraLayer], *, scaling: float) -> list[Tensor]:
    """x [..., K] -> [..., N] a layer, as in the head of this file; gradients to all that asks.

    Under autocast it computes in autocast's type, like `torch.nn.functional.linear`.
    Raises ValueError when a weight is wider than x or than its B.
    """
    kind = compute_type(x)
    flat: list[Tensor | None] = []
    for layer in layers:
        shape = tuple(layer.weight.shape)
        if shape[0] > len(layer.lora_b) or shape[1] > x.shape[-1]:
            raise ValueError(
                f"weight {shape} does not fit B {tuple(layer.lora_b.shape)} and x [..., "
                f"{x.shape[-1]}]: expected at most as many rows as B and columns as x"
            )
        parts = (layer.weight, layer.lora_a, layer.lora_b, layer.bias)
        flat += [None if part is None else part.to(kind) for part in parts]
    outputs: tuple[Tensor, ...] = _PrefixLora.apply(x.flatten(0, -2).to(kind), scaling, *flat)
    return [y.unflatten(0, x.shape[:-1]) for y in outputs]


class _PrefixLora(torch.autograd.Function):
    """Arguments: x [M, K], s, then W, A, B, bias of every layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *flat: Tensor) -> tuple[Tensor, ...]:
        weights, factors_a, factors_b, biases = (flat[i::4] for i in range(4))
        a = torch.cat(factors_a) if len(factors_a) > 1 else factors_a[0]
        inner = x @ a.T  # [M, r of all layers]
        ranks = [len(factor) for factor in factors_a]
        outputs = []
        for w, b, bias, s in zip(weights, factors_b, biases, inner.split(ranks, 1), strict=True):
            n, k = w.shape
            y = F.linear(x[:, :k], w, bias)
            if n == len(b):
                y.addmm_(s, b.T, alpha=scaling)
            else:
                frozen, y = y, (s * scaling) @ b.T
                y[:, :n] += frozen
            outputs.append(y)
        ctx.save_for_backward(x, a, inner, *weights, *factors_b)
        ctx.scaling, ctx.ranks = scaling, ranks
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, inner, *rest = ctx.saved_tensors
        count = len(ctx.ranks)
        weights, factors_b = rest[:count], rest[count:]
        wants = [ctx.needs_input_grad[2 + i :: 4] for i in range(4)]
        wants_x = ctx.needs_input_grad[0]
        d_inner = torch.cat([dy @ b for dy, b in zip(gradients, factors_b, strict=True)], 1)
        d_inner.mul_(ctx.scaling)
        dx = _d_input(gradients, weights, d_inner, a) if wants_x else None
        d_a = (d_inner.T @ x).split(ctx.ranks) if any(wants[1]) else [None] * count
        flat: list[Tensor | None] = []
        for i, (dy, w, s) in enumerate(
            zip(gradients, weights, inner.split(ctx.ranks, 1), strict=True)
        ):
            n, k = w.shape
            flat += [
                dy[:, :n].T @ x[:, :k] if wants[0][i] else None,
                d_a[i] if wants[1][i] else None,
                # This way around the long matrix is read along its rows.
                (s.T @ dy).mul_(ctx.scaling).T if wants[2][i] else None,
                dy[:, :n].sum(0) if wants[3][i] else None,
            ]
        return dx, None, *flat


def _d_input(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], d_inner: Tensor, a: Tensor
) -> Tensor:
    """d_inner A + sum of dy[:, :n] W, the latter on the first k columns."""
    k = weights[0].shape[1]
    frozen = gradients[0][:, : len(weights[0])] @ weights[0]
    for dy, w in zip(gradients[1:], weights[1:], strict=True):
        frozen.addmm_(dy[:, : len(w)], w)
    if k == a.shape[1]:
        return frozen.addmm_(d_inner, a)
    dx = d_inner @ a
    dx[:, :k] += frozen
    return dx
