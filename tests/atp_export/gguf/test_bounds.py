"""What a block of a GGUF file may be off by: right blocks pass, a wrong one is caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from atp_export.gguf.bounds import fault
from atp_export.gguf.tensors import packed_q4
from atp_export.quantization.gptq import gptq
from gguf import GGMLQuantizationType, quants
from torch import Tensor

SIZES = [1.0, 1e-3, 1e-5, 1e-9, 1e4]
"""Of weights: below 0.008 a scale of Q8_0 is no normal fp16 number, at 1e-9 it is zero."""


def matrix(size: float) -> Tensor:
    """Heavy tails, a block of zeros, and a block that is as far off as one can be."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(64, 96, generator=draw) ** 3
    weights[3, 32:64] = 0
    # The largest weight's step is 1/127; all others lie in the middle between two levels.
    weights[5, :32] = 0.5 / 127
    weights[5, 0] = 1
    return weights * size


def eight_bits(weights: Tensor) -> Tensor:
    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(quants.dequantize(quants.quantize(weights.numpy(), kind), kind))


def four_bits(weights: Tensor, gram: Tensor) -> Tensor:
    levels, scales = gptq(weights.T, gram, bits=4, block=32)
    packed = packed_q4(levels.T.numpy(), np.ascontiguousarray(scales.T.numpy()))
    return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q4_0))


@pytest.mark.parametrize("size", SIZES)
def test_blocks_of_eight_bits_pass_and_a_level_more_does_not(size: float) -> None:
    weights = matrix(size)
    stored = eight_bits(weights)
    assert fault(stored, weights, "Q8_0") is None
    step = float(weights[7, 64:].abs().max()) / 127
    for wrong in (step, -step) if size > 1e-5 else (500 * step + 1e-5,):
        other = stored.clone()
        other[7, 70] += wrong
        assert "times as far away as Q8_0 can" in str(fault(other, weights, "Q8_0"))


def test_the_worst_block_is_as_far_off_as_is_said() -> None:
    weights = matrix(1.0)[5:6, :32]
    off = float((eight_bits(weights) - weights).norm() / weights.norm())
    most = math.sqrt(32) * (1 / 254 + 2**-11)
    assert 0.8 * most < off <= most < 0.0252


@pytest.mark.parametrize("size", SIZES[:3])
def test_rows_of_gptq_pass_and_a_wrong_one_does_not(size: float) -> None:
    """With a gram of few inputs, where gptq goes furthest."""
    weights = matrix(size)
    inputs = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    stored = four_bits(weights, inputs.T @ inputs)
    assert fault(stored, weights, "Q4_0") is None
    stored[9] = stored[10]
    assert "times as far away as gptq lets it" in str(fault(stored, weights, "Q4_0"))


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_plain_numbers_are_the_same_or_wrong(kind: str) -> None:
    weights = matrix(1.0)
    stored = weights.half().float() if kind == "F16" else weights.clone()
    assert fault(stored, weights, kind) is None
    stored[2, 2] += 1e-3
    assert fault(stored, weights, kind) == f"a value lies 0.001 away ({kind})"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_what_is_no_number_is_a_fault(kind: str) -> None:
    weights = matrix(1.0)
    stored = weights.clone()
    stored[2, 2] = torch.nan
    assert fault(stored, weights, kind)
