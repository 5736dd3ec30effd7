"""LoRA under a fixed decision: one product for the frozen and the low-rank term, both ways.

    y        = [x | x A^T] [W | s B]^T + bias        the buffer [N, K + R], x in one as wide
    [dx | d] = dy [W | s B],  dx += d A              d = s dy B
    dA       = d^T x,  dB = s dy^T (x A^T)

Layers that read one x are stacked: W's rows one after the other, s B by blocks on the diagonal.
R is the sum of the ranks, filled up with zeros to a multiple of `ROOM`. Nothing is added to y or dx
in a pass of its own but d A. (A low-rank term in the frozen product's accumulator, as LoRAFusion
has it, arXiv 2510.00206; made by cuBLAS, which is ahead of a Triton product.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOM = 64
"""Of columns: the tensor cores' products go over so many at a time."""


@dataclass(frozen=True, kw_only=True)
class JoinedWeights:
    """The buffer [W | s B] of layers that read one x.

    buffer [N, columns + room], rows of every layer, ranks of every layer's LoRA.
    """

    buffer: Tensor
    columns: int
    rows: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def empty(
        cls, columns: int, rows: Sequence[int], ranks: Sequence[int], like: Tensor
    ) -> JoinedWeights:
        """All zero, in the type and on the device of `like`."""
        buffer = like.new_zeros(sum(rows), columns + room_for(sum(ranks)))
        return cls(buffer=buffer, columns=columns, rows=tuple(rows), ranks=tuple(ranks))

    def frozen(self) -> list[Tensor]:
        """A view [rows, columns] of every layer's W."""
        return list(self.buffer[:, : self.columns].split(self.rows))

    @torch.no_grad()
    def fill(self, factors_b: Sequence[Tensor], scaling: float) -> None:
        """Write s B of every layer [rows, rank] in its place."""
        at = self.columns
        for part, b, rank in zip(self.buffer.split(self.rows), factors_b, self.ranks, strict=True):
            part[:, at : at + rank].copy_(b * scaling)
            at += rank


def room_for(rank: int) -> int:
    """Columns that x has beside it for x A^T."""
    return -(-rank // ROOM) * ROOM


def joined_lora_linears(
    x: Tensor,
    weights: JoinedWeights,
    factors: Sequence[tuple[Tensor, Tensor]],
    *,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K] -> [..., N], all layers' outputs one after the other; gradients to x, to every
    layer's A [rank, K] and B [rows, rank], and to the bias [N].

    weights: filled with these B already, in x's type. x may be one `roomy`, with x A^T beside it.
    """
    a = torch.cat([a for a, _ in factors]) if len(factors) > 1 else factors[0][0]
    beside = _beside(x, weights)
    flat = x.flatten(0, -2) if beside is None else None
    y: Tensor = _JoinedLora.apply(
        flat, beside, weights, scaling, weights.buffer, bias, a, *(b for _, b in factors)
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def with_room(whole: Tensor, tokens: Sequence[int], columns: int) -> Tensor:
    """x [*tokens, columns] of [x | x A^T | 0] [M, columns + room], which it remembers, so that
    `joined_lora_linears` need not make it."""
    x = whole[:, :columns].view(*tokens, columns)
    x.roomy = whole  # type: ignore[attr-defined]
    return x


def _beside(x: Tensor, weights: JoinedWeights) -> Tensor | None:
    """[x | x A^T | 0] where whoever made x wrote it so."""
    whole: Tensor | None = getattr(x, "roomy", None)
    fits = whole is not None and whole.shape[1] == weights.buffer.shape[1]
    return whole if fits and x.shape[-1] == weights.columns else None


class _JoinedLora(torch.autograd.Function):
    """x, or [x | x A^T | 0] in its place: the gradient of its room is never read."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        beside: Tensor | None,
        weights: JoinedWeights,
        scaling: float,
        buffer: Tensor,
        bias: Tensor | None,
        a: Tensor,
        *factors_b: Tensor,
    ) -> Tensor:
        k, rank = weights.columns, sum(weights.ranks)
        if beside is None:
            assert x is not None
            beside = buffer.new_empty(len(x), buffer.shape[1])
            beside[:, :k].copy_(x)
            torch.mm(beside[:, :k], a.T, out=beside[:, k : k + rank])
            beside[:, k + rank :].zero_()
        # The buffer is saved, not the B in it: were it written to before the backward pass,
        # autograd would say so.
        ctx.save_for_backward(beside, a, buffer)
        ctx.weights, ctx.scaling = weights, scaling
        return F.linear(beside, buffer, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (dy,) = gradients
        beside, a, buffer = ctx.saved_tensors
        weights = ctx.weights
        k, rank = weights.columns, sum(weights.ranks)
        wants_x, wants_beside, *_ = ctx.needs_input_grad
        wants_bias, wants_a = ctx.needs_input_grad[5:7]
        both = dy @ buffer
        dx, d = both[:, :k], both[:, k : k + rank]
        if wants_x or wants_beside:
            dx.addmm_(d, a)
        d_b: list[Tensor | None] = []
        parts = zip(
            dy.split(weights.rows, 1), beside[:, k : k + rank].split(weights.ranks, 1), strict=True
        )
        for wants, (dy_part, s) in zip(ctx.needs_input_grad[7:], parts, strict=True):
            # This way around the long matrix is read along its rows.
            d_b.append((s.T @ dy_part).mul_(ctx.scaling).T if wants else None)
        return (
            dx if wants_x else None,
            both if wants_beside else None,
            *(None,) * 3,
            dy.sum(0) if wants_bias else None,
            d.T @ beside[:, :k] if wants_a else None,
            *d_b,
        )
