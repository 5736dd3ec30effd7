"""Whether an fp32 graph is as near to its model as fp32 itself is.

A difference of logits between two fp32 computations has the rounding of both in it: of the dense
SmolLM2-135M, PyTorch's own logits (up to 35) lie 1.4e-4 from those of the model in float64, ONNX
Runtime's 1.1e-4. So where the difference passes the tolerance, the model in float64 decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from atp_export.verification.reference import Floats

# Two orders of summation in fp32 differ by small factors; a wrong graph by orders of magnitude, and
# at more than a few positions. Where a text leaves the model ill-conditioned at one token, both err
# 10 to 100 times as far there, and one draw of rounding is no measure of another: docs/verify.md.
MOST_TIMES_PYTORCH, MOST_TIMES_AT_WORST = 4.0, 16.0


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Largest distances of logits to those of the model in float64, and how many times PyTorch's
    ONNX's is at most at nine positions in ten."""

    onnx: float
    pytorch: float
    times: float

    @property
    def explains(self) -> bool:
        """Whether the export is as near as fp32 comes."""
        at_worst = self.onnx <= MOST_TIMES_AT_WORST * self.pytorch
        return at_worst and self.times <= MOST_TIMES_PYTORCH

    def __str__(self) -> str:
        return (
            f"to float64: ONNX {self.onnx:.1e}, PyTorch {self.pytorch:.1e}, at nine positions in "
            f"ten at most {self.times:.1f} times PyTorch's"
        )


def rounding_of(found: Iterable[tuple[Floats, Floats, Floats]]) -> Rounding:
    """Of logits [n, V] by ONNX, by PyTorch, and by the model in float64."""
    both = [
        (np.abs(onnx - exact).max(axis=1), np.abs(own - exact).max(axis=1))
        for onnx, own, exact in found
    ]
    onnx, pytorch = (
        np.concatenate(column).astype(np.float64) for column in zip(*both, strict=True)
    )
    least = np.finfo(np.float32).tiny  # Where PyTorch has no error at all, ONNX may have none.
    times = np.quantile(np.maximum(onnx, least) / np.maximum(pytorch, least), 0.9)
    return Rounding(onnx=float(onnx.max()), pytorch=float(pytorch.max()), times=float(times))
