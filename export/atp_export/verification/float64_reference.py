"""Whether an fp32 graph is as near to its model as fp32 itself is.

A difference of logits between two fp32 computations has the rounding of both in it: of the dense
SmolLM2-135M, PyTorch's own logits (up to 35) lie 1.4e-4 from those of the model in float64, ONNX
Runtime's 1.1e-4. So where the difference passes the tolerance, the model in float64 decides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atp_export.verification.reference import Reference

# Two orders of summation in fp32 differ by small factors (1.9 on the demo's slim model, 0.8 on its
# dense one); a wrong graph by orders of magnitude.
MOST_TIMES_PYTORCH = 4.0


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Largest distances of logits to those of the model in float64."""

    onnx: float
    pytorch: float

    @property
    def explains(self) -> bool:
        """Whether the export is as near as fp32 comes."""
        return self.onnx <= self.limit

    @property
    def limit(self) -> float:
        return MOST_TIMES_PYTORCH * self.pytorch

    def __str__(self) -> str:
        return f"to float64: ONNX {self.onnx:.1e}, PyTorch {self.pytorch:.1e}"


@torch.no_grad()
def rounding(
    model: nn.Module | Reference, texts: Sequence[tuple[list[int], NDArray[np.float32]]]
) -> Rounding:
    """Distances over texts: (tokens, ONNX's logits [n, V] of the last n). The model is copied in
    float64."""
    exact: Any = model.double() if isinstance(model, Reference) else copy.deepcopy(model).double()
    onnx, pytorch = 0.0, 0.0
    for tokens, logits in texts:
        ids = torch.tensor([tokens], device=next(model.parameters()).device)
        truth, own = (
            of(ids, logits_to_keep=len(logits)).logits[0].cpu().numpy() for of in (exact, model)
        )
        onnx = max(onnx, float(np.abs(logits - truth).max()))
        pytorch = max(pytorch, float(np.abs(own - truth).max()))
    return Rounding(onnx=onnx, pytorch=pytorch)
