"""One masked LoRA layer, forward and backward, against its rivals.

`make bench` runs every suite of this folder and compares it with the last saved run (.benchmarks/,
not committed): a capability that has to stay fast adds its suite here. A suite is short, says what
is right before it is timed, and groups what is to be read side by side. What one rival gains over
another is `atp-edge bench kernels`, which measures them in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from atp_bench.kernels.dtypes import TOLERANCE
from atp_bench.kernels.lora import LoraCase, error_of, make_inputs, rivals, timed
from atp_bench.kernels.run import SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, DTYPE = (4096, "bf16") if DEVICE == "cuda" else (128, "fp32")
NAMES = (
    "peft, adapters as the model",
    "weights sliced beforehand",
    "ours, masked output",
    "ours, narrow output",
    "ours, joined",
)


@pytest.mark.parametrize("kept", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES["7b" if DEVICE == "cuda" else "small"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(
    benchmark: Any, name: str, shape: tuple[int, int], kept: float
) -> None:
    case = LoraCase(
        in_features=shape[0], out_features=shape[1], rank=16, tokens=TOKENS, kept=kept, dtype=DTYPE
    )
    made = make_inputs(case, DEVICE)
    layer = rivals(made, compiled=False)[name]
    assert error_of(layer, made) <= TOLERANCE[case.dtype]
    benchmark.group = f"{shape[0]} -> {shape[1]}, {kept:.0%} kept"
    benchmark.pedantic(timed, args=(layer, made), rounds=5, warmup_rounds=1)
