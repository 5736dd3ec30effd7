"""pytest-benchmark over the same layers as `atp-edge bench kernels`.

    python -m pytest bench/test_training.py

Compare runs with --benchmark-autosave and --benchmark-compare.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from atp_bench.kernels.lora import SHAPES, TOLERANCE, Case, error_of, make_inputs, rivals, timed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 4096 if DEVICE == "cuda" else 256
NAMES = (
    "peft, adapters as the model",
    "weights sliced beforehand",
    "ours, masked output",
    "ours, narrow output",
)


@pytest.mark.parametrize("kept", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES["7b" if DEVICE == "cuda" else "small"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(
    benchmark: Any, name: str, shape: tuple[int, int], kept: float
) -> None:
    case = Case(
        in_features=shape[0], out_features=shape[1], rank=16, tokens=TOKENS, kept=kept, dtype="bf16"
    )
    made = make_inputs(case, DEVICE)
    layer = rivals(made, compiled=False)[name]
    assert error_of(layer, made) <= TOLERANCE[case.dtype]
    benchmark.group = f"{shape[0]} -> {shape[1]}, {kept:.0%} kept"
    benchmark.pedantic(timed, args=(layer, made), rounds=5, warmup_rounds=1)
