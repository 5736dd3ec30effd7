"""Masked LoRA in plain torch: what the kernels mean, and the path that runs without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
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


def masked_swiglu(
    e: Tensor, u: Tensor, mask: Tensor | None, a: Tensor | None = None, room: int = 0
) -> Tensor:
    """h = mask * silu(e) * u: e, u [M, N], mask [N] or none.

    With a [r, N]: [h | h A^T | 0] [M, N + room], r <= room.
    """
    h = F.silu(e) * u
    return _with_room(h if mask is None else h * mask.to(e.dtype), a, room)


def masked_swiglu_backward(
    dh: Tensor, e: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of h = mask * silu(e) * u: [de | du] [M, 2 N]; the mask's gradient and the importance, the
    sum over M of (dh silu(e) u)^2, [N] each."""
    sigmoid = e.sigmoid()
    silu = e * sigmoid
    wide = torch.promote_types(e.dtype, torch.float32)
    product = dh.to(wide) * silu.to(wide) * u.to(wide)
    dh = dh if mask is None else dh * mask.to(dh.dtype)
    both = torch.cat([dh * u * (sigmoid + silu * (1 - sigmoid)), dh * silu], -1)
    return both, product.sum(0), product.square().sum(0)


def norm_into(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    room: int,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream + delta [M, K], [x | x A^T | 0] [M, K + room] in `kind`, 1 / root mean square [M]).

    x is the RMS norm of stream + delta, times weight [K]; a [r, K], r <= room.
    """
    whole = stream if delta is None else stream + delta
    wide = whole.to(torch.promote_types(whole.dtype, torch.float32))
    root = torch.rsqrt(wide.square().mean(-1) + eps)
    x = (weight * (wide * root[:, None]).to(whole.dtype)).to(kind)
    return whole, _with_room(x, a, room), root


def norm_backward(
    dx: Tensor, stream: Tensor, weight: Tensor, root: Tensor, d_stream: Tensor | None
) -> Tensor:
    """The gradient of the stream [M, K] that a norm reads and that goes on beside it: from that of
    the norm's output dx [M, K], and of the stream itself after it."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    n = stream.to(wide) * root[:, None]
    g = dx.to(wide) * weight.to(wide)
    found = (g - n * (g * n).mean(-1, keepdim=True)) * root[:, None]
    return (found if d_stream is None else found + d_stream).to(stream.dtype)


def _with_room(x: Tensor, a: Tensor | None, room: int) -> Tensor:
    if a is None:
        return x
    return torch.cat([x, F.pad(x @ a.T, (0, room - len(a)))], -1)


def scored_mask_backward(z: Tensor, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = mask * z, from g = dL/dy [M, N]: dz [M, N], dmask [size] and the importance
    sum over M of (sum of |z g| over a structure)^2 [size]; a structure is N / size columns."""
    wide = torch.promote_types(z.dtype, torch.float32)
    product = (z.to(wide) * g.to(wide)).unflatten(-1, (len(mask), -1))
    rows = mask.to(g.dtype).repeat_interleave(z.shape[1] // len(mask))
    return g * rows, product.sum((0, 2)), product.abs().sum(2).square().sum(0)


def proximal_step(groups: Sequence[Tensor], stays: Sequence[Tensor], threshold: float) -> None:
    """w <- w / |w| * max(|w| - threshold, 0) in place on every structure w of the groups [size, .,
    .] that `stays` (bool [size] each) does not name."""
    for group, stay in zip(groups, stays, strict=True):
        norms = torch.linalg.vector_norm(group, dim=(1, 2))
        shrunk = (1 - threshold / norms.clamp_min(1e-30)).clamp_min(0)
        group.mul_(shrunk.masked_fill(stay, 1)[:, None, None])


def rope(
    packed: Tensor, cosine: Tensor, sine: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [M, heads, D], k and v [M, groups, D] of packed [M, (heads + 2 groups) D]; q and k turned.

    cosine, sine [P, D]: of the positions, which token m has at m % P. Halves of a head are turned
    against each other, as Llama does (transformers' `apply_rotary_pos_emb`).
    """
    m, size = len(packed), cosine.shape[1]
    at = torch.arange(m, device=packed.device) % len(cosine)
    q, k, v = packed.view(m, -1, size).split([heads, groups, groups], 1)
    return _turned(q, cosine[at], sine[at]), _turned(k, cosine[at], sine[at]), v.contiguous()


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The gradient of `rope`'s packed."""
    at = torch.arange(len(dq), device=dq.device) % len(cosine)
    c, s = cosine[at], sine[at]
    # The turn's transpose: each half's sine is the other's, the other way round.
    s = -torch.cat(s.chunk(2, -1)[::-1], -1)
    return torch.cat([_turned(dq, c, s), _turned(dk, c, s), dv], 1).flatten(1)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    turned = torch.cat([-two, one], -1)
    return (x * cosine[:, None] + turned * sine[:, None]).to(x.dtype)
