"""The operators on Triton; test_triton.py runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from atp_kernels import (
    LoraLayer,
    backend_name,
    masked_lora_linear,
    masked_qkv,
    masked_swiglu_mlp,
    reference,
)
from atp_kernels.masked_gemm_triton import masked_gemm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.atp_kernels import interpreted_bf16
from tests.atp_kernels.float64_bounds import assert_close, leaves_of, rounded_again
from tests.triton_process import DEVICE, INTERPRETED

if INTERPRETED:
    interpreted_bf16.patch()
TYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYERS: dict[str, Any] = {
    "m": st.integers(1, 70),
    "n": st.integers(1, 90),
    "k": st.integers(1, 70),
    "r": st.sampled_from([4, 8, 16, 33, 64, 130]),
    "kept": st.sampled_from(["all", "none", "one", "some"]),
    "placement": st.sampled_from(["base", "whole"]),
    "dtype": st.sampled_from(TYPES),
    "seed": st.integers(0, 1000),
}


def case(m: int, n: int, k: int, r: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    return {"x": normal(m, k), "weight": normal(n, k) / k**0.5, "lora_a": normal(r, k) / k**0.5,
            "lora_b": normal(n, r)}  # fmt: skip


def mask_of(size: int, kept: str, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=draw) < 0.5
    if kept != "some":
        mask[:] = kept == "all"
    if kept == "one":
        mask[seed % size] = True
    return mask.to(DEVICE)


def assert_linear_close(result: Callable[..., Any], dtype: torch.dtype, units: int) -> None:
    """`assert_close` of masked_lora_linear: result(function, kind, draw)."""
    plain = reference.masked_lora_linear
    assert_close(
        result(masked_lora_linear, dtype, None),
        result(plain, dtype, None),
        lambda draw: result(plain, torch.float64, draw),
        units,
    )


def held(mask: torch.Tensor, fixed: bool, dtype: torch.dtype) -> torch.Tensor:
    """A decision that is fixed, or one of numbers."""
    return mask if fixed else mask.to(dtype) * 0.75


def assert_gradients_close(inputs: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    """`assert_linear_close` of masked_lora_linear's output and every gradient."""
    shape = len(inputs["x"]), len(inputs["weight"])
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    def result(function: Any, kind: torch.dtype, draw: int | None) -> Any:
        arguments, leaves = leaves_of(inputs, kind, draw)
        y = function(**arguments)
        return [y.detach(), *torch.autograd.grad((y.double() * weights.double()).sum(), leaves)]

    assert_linear_close(result, dtype, units=4)


def test_triton_is_what_runs() -> None:
    assert backend_name() == "triton"


@settings(max_examples=25, deadline=None)
@given(**LAYERS, biased=st.booleans())
def test_forward_equals_float64(
    m: int,
    n: int,
    k: int,
    r: int,
    kept: str,
    placement: str,
    biased: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    inputs = case(m, n, k, r, seed, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    inputs |= {
        "bias": bias if biased else None,
        "out_mask": mask_of(n, kept, seed),
        "in_mask": mask_of(k, kept, seed + 1),
        "scaling": 0.7,
        "placement": placement,
    }

    def result(function: Any, kind: torch.dtype, draw: int | None) -> list[torch.Tensor]:
        arguments, _ = leaves_of(inputs, kind, draw)
        return [function(**arguments).detach()]

    assert_linear_close(result, dtype, units=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_sum_is_kept_in_fp32(dtype: torch.dtype) -> None:
    inputs = case(16, 16, 2048, 4, 0, dtype)
    want = reference.masked_lora_linear(**leaves_of(inputs, torch.float64, None)[0])
    ours, plain = (
        (function(**inputs) - want).square().mean().sqrt()
        for function in (masked_lora_linear, reference.masked_lora_linear)
    )
    assert ours <= plain  # torch sums in fp32 too, and rounds once more before it adds LoRA


@settings(max_examples=25, deadline=None)
@given(**LAYERS, fixed=st.booleans(), sides=st.sampled_from(["in", "out", "both"]))
def test_gradients_equal_float64(
    m: int, n: int, k: int, r: int, kept: str, placement: str, fixed: bool, sides: str,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    inputs = case(m, n, k, r, seed, dtype)
    inputs |= {
        "bias": torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype),
        "out_mask": None if sides == "in" else held(mask_of(n, kept, seed), fixed, dtype),
        "in_mask": None if sides == "out" else held(mask_of(k, kept, seed + 1), fixed, dtype),
        "scaling": 0.5,
        "placement": placement,
    }
    assert_gradients_close(inputs, dtype, seed + 2)


@pytest.mark.skipif(INTERPRETED, reason="too much for the interpreter: many tiles")
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("placement", ["base", "whole"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(3000, 1536, 576), (1030, 576, 1530)])
def test_many_tiles(
    m: int, n: int, k: int, dtype: torch.dtype, placement: str, fixed: bool
) -> None:
    inputs = case(m, n, k, 16, 0, dtype) | {
        "out_mask": held(mask_of(n, "some", 1), fixed, dtype),
        "in_mask": held(mask_of(k, "some", 2), fixed, dtype),
        "scaling": 0.5,
        "placement": placement,
    }
    assert_gradients_close(inputs, dtype, 3)


def test_gradients_are_the_same_bits_again() -> None:
    inputs = case(150, 40, 50, 8, 0, torch.float32)
    options = {
        "in_mask": torch.rand(50, device=DEVICE),
        "out_mask": torch.rand(40, device=DEVICE),
        "scaling": 0.5,
    }
    runs = []
    for _ in range(2):
        arguments, leaves = leaves_of(inputs | options, torch.float32, None)
        runs.append(torch.autograd.grad(masked_lora_linear(**arguments).square().sum(), leaves))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


class NaN(TorchDispatchMode):
    """Fills what `empty` gives with NaN: an element that no kernel wrote would show."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and isinstance(made, torch.Tensor) and made.is_floating_point():
            made.fill_(torch.nan)
        return made


@pytest.mark.parametrize("kept", ["all", "none", "one", "some"])
def test_every_element_is_written(kept: str) -> None:
    inputs = case(140, 150, 33, 4, 1, torch.float32)
    masks = {"out_mask": mask_of(150, kept, 1), "in_mask": mask_of(33, kept, 2)}
    want = reference.masked_lora_linear(**inputs, **masks)
    with NaN():
        y, _ = masked_gemm(
            inputs["x"], inputs["weight"], inputs["x"] @ inputs["lora_a"].T, inputs["lora_b"],
            None, masks["out_mask"], masks["in_mask"], False, None,
        )  # fmt: skip
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    placement=st.sampled_from(["base", "whole"]),
    fixed=st.booleans(),
    kept=st.sampled_from(["all", "none", "one", "some"]),
    dtype=st.sampled_from(TYPES),
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 40),
    channels=st.integers(1, 140),
    rank=st.sampled_from([4, 8, 64]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
# Torch's own error is small here by luck.
@example("whole", False, "all", torch.float32, 26, 3, 1, 8, True, 218)
@example("base", False, "none", torch.float32, 1, 1, 48, 8, False, 38)
def test_mlp_and_qkv_with_their_gradients(
    placement: str, fixed: bool, kept: str, dtype: torch.dtype, tokens: int, hidden: int,
    channels: int, rank: int, biased: bool, seed: int,
) -> None:  # fmt: skip
    sizes = tokens, hidden, channels, rank
    masks = mask_of(channels, kept, seed), mask_of(3, kept, seed)

    def results(kind: torch.dtype, draw: int | None = None) -> list[torch.Tensor]:
        return both_sites(sizes, masks, placement, fixed, biased, seed, dtype, kind, draw)

    ours = results(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("masked_lora", "masked_gemm"):
            patch.setattr(f"atp_kernels.{module}.on_triton", lambda x: False)
        patch.setattr("atp_kernels.swiglu.fuses", lambda x: False)
        plain = results(dtype)
    assert_close(ours, plain, lambda draw: results(torch.float64, draw), units=4)


def both_sites(
    sizes: tuple[int, ...], masks: tuple[torch.Tensor, torch.Tensor], placement: Any,
    fixed: bool, biased: bool, seed: int, dtype: torch.dtype, kind: torch.dtype, again: int | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Outputs and gradients of an MLP and of q, k, v, of values of `dtype` (`rounded_again` unless
    again is None) computed in `kind`; float64 takes the torch path."""
    tokens, hidden, size, rank = sizes
    draw = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        value = torch.randn(*shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5
        return rounded_again(value.to(DEVICE, dtype), kind, again).requires_grad_()

    x = leaf(1, tokens, hidden)
    gate, up, down = parts = [
        LoraLayer(weight=leaf(n, k), lora_a=leaf(rank, k), lora_b=leaf(n, rank),
                  bias=leaf(n) if biased else None)
        for n, k in ((size, hidden), (size, hidden), (hidden, size))
    ]  # fmt: skip
    channels, groups = masks if fixed else (m.to(kind).mul(0.5).requires_grad_() for m in masks)
    y = masked_swiglu_mlp(x, gate, up, down, channels, scaling=0.5, placement=placement)
    weight, loras = leaf(48, hidden), [(leaf(rank, hidden), leaf(n, rank)) for n in (24, 12, 12)]
    bias = leaf(48) if biased else None
    q, k, v = masked_qkv(x, weight, tuple(loras), groups, group_heads=2, head_dim=4,  # type: ignore[arg-type]
                         bias=bias, scaling=0.5, placement=placement)  # fmt: skip
    leaves = [x, weight, *(t for pair in loras for t in pair)]
    leaves += [t for part in parts for t in (part.lora_a, part.lora_b)]
    leaves += [] if fixed else [channels, groups]
    leaves += [] if bias is None else [bias, *(p.bias for p in parts if p.bias is not None)]
    outputs = (y, q, k, v)
    weights = [torch.randn(t.shape, generator=draw).to(DEVICE, dtype).double() for t in outputs]
    loss = torch.stack(
        [(t.double() * w).sum() for t, w in zip(outputs, weights, strict=True)]
    ).sum()
    return [*(t.detach() for t in outputs), *torch.autograd.grad(loss, leaves)]


@triton.jit
def arithmetic_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, product_ptr, dot_ptr, rounded_ptr, N: tl.constexpr
):
    """a * b, a b^T in fp32, and that rounded to bf16, of bf16 [N, N]."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(product_ptr + at, a * b)
    dot = tl.dot(a, tl.trans(b))
    tl.store(dot_ptr + at, dot)
    tl.store(rounded_ptr + at, dot.to(tl.bfloat16))


def test_bf16_is_here_what_it_is_in_torch() -> None:
    """Without interpreted_bf16.py every one of these differs."""
    a, b = case(32, 32, 32, 1, 3, torch.bfloat16)["x"], case(32, 32, 32, 1, 4, torch.bfloat16)["x"]
    a[0, 0], b[0, 0] = torch.inf, 2.0
    product, rounded = torch.empty_like(a), torch.empty_like(a)
    dot = torch.empty(32, 32, device=DEVICE)
    arithmetic_kernel[(1,)](a, b, product, dot, rounded, N=32)
    assert torch.equal(product, a * b)
    torch.testing.assert_close(dot, a.float() @ b.float().T)
    assert torch.equal(rounded, dot.bfloat16())


def test_non_contiguous_inputs_and_leading_dimensions() -> None:
    inputs = case(24, 40, 32, 8, 5, torch.float32)
    x = torch.randn(3, 32, 8, device=DEVICE).transpose(1, 2)
    weight = inputs["weight"].T.contiguous().T
    ours = masked_lora_linear(x, weight, inputs["lora_a"], inputs["lora_b"])
    want = reference.masked_lora_linear(x, weight, inputs["lora_a"], inputs["lora_b"])
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)
