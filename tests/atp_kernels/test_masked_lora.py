"""The torch paths: what masked LoRA means; skipping changes neither values nor gradients."""

from __future__ import annotations

import pytest
import torch
from atp_kernels import backend, masked_lora_linear, reference
from atp_kernels.masked_lora import skipping_lora_linear
from hypothesis import given, settings
from hypothesis import strategies as st

Leaves = list[torch.Tensor]


def leaves(seed: int, dtype: torch.dtype = torch.float64) -> Leaves:
    """x [5, 12], W [9, 12], A [3, 12], B [9, 3], bias [9]."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((5, 12), (9, 12), (3, 12), (9, 3), (9,))
    return [torch.randn(s, generator=draw, dtype=dtype).requires_grad_() for s in shapes]


def masks(seed: int, share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(9, generator=draw) < share, torch.rand(12, generator=draw) < share


@pytest.mark.parametrize("placement", ["base", "whole"])
def test_gradcheck_of_every_input_and_of_the_masks(placement: str) -> None:
    out_mask, in_mask = (m.double().requires_grad_() for m in masks(0))

    def function(*values: torch.Tensor) -> torch.Tensor:
        x, w, a, b, bias, om, im = values
        return masked_lora_linear(
            x,
            w,
            a,
            b,
            bias=bias,
            out_mask=om,
            in_mask=im,
            scaling=0.5,
            placement=placement,  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(function, (*leaves(1), out_mask, in_mask))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    placement=st.sampled_from(["base", "whole"]),
    sides=st.sampled_from(["in", "out", "both"]),
)
def test_skipping_equals_masking(seed: int, share: float, placement: str, sides: str) -> None:
    out_mask, in_mask = masks(seed, share)
    options = {
        "out_mask": out_mask if sides != "in" else None,
        "in_mask": in_mask if sides != "out" else None,
        "scaling": 0.5,
        "placement": placement,
    }
    results = []
    for function in (skipping_lora_linear, reference.masked_lora_linear):
        x, w, a, b, bias = values = leaves(seed)
        y = function(x, w, a, b, bias=bias, **options)  # type: ignore[arg-type]
        results.append((y, *torch.autograd.grad(y.square().sum(), values, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        # What is never read has no gradient at all where masking gives zeros.
        got = torch.zeros_like(theirs) if ours is None else ours
        torch.testing.assert_close(got, theirs)


def test_base_placement_leaves_the_lora_of_removed_rows() -> None:
    x, w, a, b, _ = leaves(2)
    removed = torch.zeros(9, dtype=torch.bool)
    base = masked_lora_linear(x, w, a, b, out_mask=removed, placement="base")
    torch.testing.assert_close(base, x @ a.T @ b.T)
    assert not masked_lora_linear(x, w, a, b, out_mask=removed, placement="whole").any()


def test_autocast_computes_in_its_type_like_linear() -> None:
    x, w, a, b, bias = leaves(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_lora_linear(x, w, a, b, bias=bias, in_mask=masks(3)[1])
    assert y.dtype == torch.bfloat16


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_KERNELS", "cuda")
    backend.backend_name.cache_clear()
    with pytest.raises(ValueError, match="'cuda': expected auto, joined, triton or torch"):
        backend.backend_name()
    monkeypatch.undo()
    backend.backend_name.cache_clear()
