"""Run by test_triton.py in a process of its own: TRITON_INTERPRET must be set before the import."""

from __future__ import annotations

import pytest
import torch
from atp_kernels import backend_name, masked_lora_linear, reference
from hypothesis import given, settings
from hypothesis import strategies as st


def case(m: int, n: int, k: int, r: int, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    return {"x": normal(m, k), "weight": normal(n, k) / k**0.5, "lora_a": normal(r, k) / k**0.5,
            "lora_b": normal(n, r)}  # fmt: skip


def mask_of(size: int, kept: str, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=draw) < 0.5
    if kept != "some":
        mask[:] = kept == "all"
    if kept == "one":
        mask[seed % size] = True
    return mask


def exact(inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """The reference in float64."""
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in {**inputs, **options}.items()
    }  # fmt: skip
    return reference.masked_lora_linear(**wide)  # type: ignore[arg-type]


def test_the_interpreter_is_what_runs() -> None:
    assert backend_name() == "triton"


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 90),
    k=st.integers(1, 70),
    r=st.sampled_from([4, 8, 16, 33, 64]),
    kept=st.sampled_from(["all", "none", "one", "some"]),
    placement=st.sampled_from(["base", "whole"]),
    biased=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_forward_equals_float64(
    m: int, n: int, k: int, r: int, kept: str, placement: str, biased: bool, half: bool, seed: int
) -> None:
    dtype = torch.float16 if half else torch.float32
    inputs = case(m, n, k, r, seed, dtype)
    options = {
        "bias": torch.randn(n).to(dtype) if biased else None,
        "out_mask": mask_of(n, kept, seed),
        "in_mask": mask_of(k, kept, seed + 1),
        "scaling": 0.7,
        "placement": placement,
    }
    ours = masked_lora_linear(**inputs, **options)  # type: ignore[arg-type]
    want = exact(inputs, **options)
    plain = reference.masked_lora_linear(**inputs, **options)  # type: ignore[arg-type]
    # Not worse than twice torch's own error at this precision, plus one unit in the last place.
    allowed = 2 * (plain.double() - want).abs().max() + torch.finfo(dtype).eps * (
        1 + want.abs().max()
    )
    assert (ours.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("placement", ["base", "whole"])
def test_gradients_equal_the_reference(placement: str) -> None:
    inputs = case(17, 24, 20, 8, 3, torch.float32)
    out_mask, in_mask = mask_of(24, "some", 1).float(), mask_of(20, "some", 2).float()
    found = []
    for function in (masked_lora_linear, reference.masked_lora_linear):
        leaves = [t.clone().requires_grad_() for t in (*inputs.values(), out_mask, in_mask)]
        x, weight, a, b, om, im = leaves
        y = function(
            x,
            weight,
            a,
            b,
            out_mask=om,
            in_mask=im,
            scaling=0.5,
            placement=placement,  # type: ignore[arg-type]
        )
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_non_contiguous_inputs_and_leading_dimensions() -> None:
    inputs = case(24, 40, 32, 8, 5, torch.float32)
    x = torch.randn(3, 32, 8).transpose(1, 2)
    weight = inputs["weight"].T.contiguous().T
    ours = masked_lora_linear(x, weight, inputs["lora_a"], inputs["lora_b"])
    want = reference.masked_lora_linear(x, weight, inputs["lora_a"], inputs["lora_b"])
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)
