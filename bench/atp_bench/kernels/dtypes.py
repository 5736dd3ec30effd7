"""The types that kernels are measured in."""

from __future__ import annotations

from typing import Literal

import torch

Dtype = Literal["fp32", "bf16", "fp16"]
TORCH: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
# The largest error of what is right, over the largest value of the output or gradient: a few units
# in the last place of the type, and the rounding of x A^T before its second product.
TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 5e-3}
