"""Causal attention for a CPU against its meaning, written out in fp64."""

from __future__ import annotations

import pytest
import torch
from atp_kernels import causal_attention
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]
# (B, H, K, T, D); chunks of 128 queries end before, at and after the last token.
SHAPES = [(1, 1, 1, 1, 8), (2, 4, 2, 127, 16), (1, 9, 3, 256, 64), (2, 6, 1, 300, 32)]


def inputs(shape: tuple[int, int, int, int, int]) -> Inputs:
    batch, heads, groups, tokens, size = shape
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, n, size, generator=draw) for n in (heads, groups, groups))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # as projections give them


def meaning(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ v


def with_gradients(attention: object, given: Inputs, kind: torch.dtype) -> list[Tensor]:
    """Output and d q, d k, d v under one gradient, in fp64."""
    q, k, v = (x.detach().to(kind).requires_grad_() for x in given)
    out = attention(q, k, v, scale=0.3)  # type: ignore[operator]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad.to(out.dtype))
    return [x.detach().double() for x in (out, q.grad, k.grad, v.grad) if x is not None]


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_attention_s_own(shape: tuple[int, int, int, int, int]) -> None:
    given = inputs(shape)
    found = with_gradients(causal_attention, given, torch.float32)
    wanted = with_gradients(meaning, given, torch.float64)
    assert len(found) == 4
    assert found[0].shape == given[0].shape
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_under_autocast_it_is_about_as_exact_as_its_meaning(
    shape: tuple[int, int, int, int, int],
) -> None:
    given = inputs(shape)
    exact = with_gradients(meaning, given, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(causal_attention, given, torch.float32)
        rival = with_gradients(meaning, given, torch.float32)
    for ours, theirs in zip(distances(found, exact), distances(rival, exact), strict=True):
        assert ours < 1.5 * theirs


def test_it_keeps_nothing_between_forward_and_backward_but_its_inputs() -> None:
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    q, k, v = (x.requires_grad_() for x in inputs(SHAPES[2]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        causal_attention(q, k, v, scale=1.0)
    assert sum(kept) == q.numel() + k.numel() + v.numel()
