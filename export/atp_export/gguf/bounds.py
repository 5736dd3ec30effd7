"""How far what a file holds may lie from the checkpoint's, by the arithmetic of its type.

- F32, F16: nowhere; F16 is the nearest number.
- Q8_0: a block of 32 has levels m / 127 apart, m its largest magnitude, and an fp16 scale. A value
  is half a level off at most, and goes with the scale by 2^-11 of itself: m (1/254 + 2^-11). Of a
  block's length, which is m or more, that is sqrt(32) (1/254 + 2^-11) = 0.0251 at most.
- Q4_0: no value has a bound of its own, for gptq hands what one weight loses to others. A row has
  gptq's, MOST_MOVED; to the nearest it is sqrt(31) / 16 = 0.35 at most, which is less (m itself is
  a level, and what is cut off above the last level is near m itself). The scale is fp16 as well.
"""

from __future__ import annotations

import math

from torch import Tensor

from atp_export.gguf.tensors import BLOCK
from atp_export.quantization.gptq import MOST_MOVED

HALF_ULP = 2.0**-11
"""Of a number that is rounded to fp16."""
HALF_SMALLEST = 2.0**-25
"""Of one below 2^-14, whose steps are 2^-24 whatever its size."""
FP32 = 2.0**-22
"""What four operations in fp32 add, of a block's largest magnitude."""


def fault(value: Tensor, expected: Tensor, kind: str) -> str | None:
    """What shows that a stored tensor is not the expected one; None: nothing does.

    value, expected: [N, K], or [N]; kind: ggml's name of the type.
    """
    if kind == "Q8_0":
        times = _largest(value - expected, _of_a_value(expected))
        return None if times <= 1 else f"a value lies {times:.3g} times as far away as Q8_0 can"
    if kind == "Q4_0":
        off = (value - expected).norm(dim=1)
        times = _largest(off, _of_a_row(expected))
        return None if times <= 1 else f"a row lies {times:.3g} times as far away as gptq lets it"
    off = (value - (expected.half().float() if kind == "F16" else expected)).abs()
    return None if bool((off == 0).all()) else f"a value lies {float(off.max()):.3g} away ({kind})"


def _largest(off: Tensor, most: Tensor) -> float:
    return float((off.abs() / most).nan_to_num(nan=math.inf).max())


def _of_a_value(expected: Tensor) -> Tensor:
    """[N, K]: how far a Q8_0 block's values may lie."""
    m = expected.unflatten(1, (-1, BLOCK)).abs().amax(2)
    scale = (m / 127 * HALF_ULP).clamp_min(HALF_SMALLEST)
    return (m * (1 / 254 + FP32) + 127 * scale).repeat_interleave(BLOCK, dim=1)


def _of_a_row(expected: Tensor) -> Tensor:
    """[N]: how far a row of gptq's 4-bit levels may lie, 8 of them below zero."""
    moved, length = MOST_MOVED[4], expected.norm(dim=1)
    smallest = 8 * HALF_SMALLEST * math.sqrt(expected.shape[1])
    return length * (moved + (1 + moved) * HALF_ULP + FP32) + smallest
