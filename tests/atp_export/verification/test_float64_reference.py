"""Which differences of fp32 logits the rounding of fp32 explains."""

from __future__ import annotations

import numpy as np
import pytest
from atp_export.verification.float64_reference import rounding_of


@pytest.mark.parametrize(
    ("at_most_positions", "at_worst", "explained"),
    [
        (1.0, 1.0, True),
        # One token at which the model is ill-conditioned: measured on a licence text.
        (1.0, 7.0, True),
        (1.0, 17.0, False),
        (5.0, 7.0, False),  # A graph that is wrong is so at most positions.
        (float("nan"), float("nan"), False),
    ],
)
def test_one_ill_conditioned_token_is_told_from_a_wrong_graph(
    at_most_positions: float, at_worst: float, explained: bool
) -> None:
    exact = np.zeros((20, 8))
    own = np.full((20, 8), 1e-5, np.float32)
    onnx = own * np.float32(at_most_positions)
    own[6] *= 30
    onnx[6] = own[6] * np.float32(at_worst)
    found = rounding_of([(onnx[:9], own[:9], exact[:9]), (onnx[9:], own[9:], exact[9:])])
    assert found.explains == explained


def test_a_fault_at_some_positions_is_none_of_one_token() -> None:
    """As of late positions, or of one text among several."""
    exact, own = np.zeros((10, 8)), np.full((10, 8), 1e-5, np.float32)
    onnx = own.copy()
    onnx[:4] *= 15
    assert not rounding_of([(onnx, own, exact)]).explains
