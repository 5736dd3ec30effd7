"""Causal attention for training on a CPU: torch's fused forward, and a backward of its own.

transformers' eager attention goes over its [T, T] scores six times in fp32, and the backward of
torch's fused one is slow on a CPU. Here the forward is torch's fused one, and keeps its inputs
alone; the backward makes the scores again, a chunk of queries at a time and only up to the last key
that the chunk sees, with matrix products and two fused passes (recomputation as in FlashAttention,
arXiv 2205.14135, section 3.1). What it gains is in docs/kernels.md.

Shapes: B batch, H query heads, K key and value heads (H a multiple of it), G = H / K, T tokens,
D dimensions of a head, C queries of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from atp_kernels.autocast import compute_type

CHUNK_QUERIES = 128


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """softmax(scale * q kᵀ, masked to keys not after the query) v: [B, H, T, D].

    q [B, H, T, D], k and v [B, K, T, D], on the CPU; computed in autocast's type where it is on.
    Differentiable once.
    """
    batch, heads, tokens, _ = q.shape
    groups = batch * k.shape[1]
    kind = compute_type(q)
    grouped = (q * scale).to(kind).reshape(groups, -1, tokens, q.shape[-1])
    keys, values = (x.to(kind).reshape(groups, tokens, x.shape[-1]) for x in (k, v))
    out: Tensor = _CausalAttention.apply(grouped, keys, values)
    return out.view(batch, heads, tokens, -1)


class _CausalAttention(torch.autograd.Function):
    """q [B * K, G, T, D], already scaled; k, v [B * K, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(
            q, k[:, None], v[:, None], is_causal=True, scale=1.0, enable_gqa=True
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        d_q = torch.empty_like(q)
        # Sums over chunks are kept in fp32 whatever the type of the inputs.
        d_k, d_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for start in range(0, q.shape[2], CHUNK_QUERIES):
            chunk = slice(start, min(start + CHUNK_QUERIES, q.shape[2]))
            queries, d_chunk = q[:, :, chunk].flatten(1, 2), d_out[:, :, chunk].flatten(1, 2)
            keys, values = k[:, : chunk.stop], v[:, : chunk.stop]
            weights = _weights(queries, keys, chunk)  # [B * K, G * C, keys seen]
            d_v[:, : chunk.stop] += weights.mT @ d_chunk
            d_weights = d_chunk @ values.mT
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, :, chunk] = (d_scores @ keys).view_as(q[:, :, chunk])
            d_k[:, : chunk.stop] += d_scores.mT @ queries
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def _weights(queries: Tensor, keys: Tensor, chunk: slice) -> Tensor:
    """Attention weights of a chunk's queries [B * K, G * C, D] over the keys up to its last."""
    scores = queries @ keys.mT
    within = scores.unflatten(1, (-1, chunk.stop - chunk.start))[..., chunk]  # a view
    later = torch.ones(within.shape[-2:], dtype=torch.bool).triu(1)
    within.masked_fill_(later, float("-inf"))
    return scores.softmax(-1)
