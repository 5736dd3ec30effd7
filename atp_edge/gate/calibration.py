"""Whether the models are as often right as they are sure, before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atp_edge.evaluation.task_scores import calibration_error
from atp_edge.gate.measured_text import Measured
from atp_edge.gate.results import Check
from atp_edge.gate.settings import CalibrationLimits
from atp_edge.gate.statistics import Floats, Status

ADAPTIVE_BINS = 15
RESAMPLES = 400


def adaptive_error(confidence: Floats, right: Floats) -> float:
    """Calibration error over 15 bins that hold as many tokens each (arXiv 1904.01685)."""
    order = np.argsort(confidence, kind="stable")
    bins = [b for b in np.array_split(order, ADAPTIVE_BINS) if len(b)]
    gaps = [len(b) * abs(right[b].mean() - confidence[b].mean()) for b in bins]
    return float(sum(gaps) / len(confidence))


def check_calibration(
    measured: Measured, limits: CalibrationLimits, level: float, fewest: int, seed: int
) -> tuple[list[Check], dict[str, Any]]:
    """The rise of the next token's calibration error, its interval by resampling documents."""
    pairs = list(zip(measured.confidence, measured.right, strict=True))
    ece, adaptive = (
        [of(confidence, right) for confidence, right in pairs]
        for of in (calibration_error, adaptive_error)
    )
    rises = _resampled_rises(measured, seed)
    low, high = (float(q) for q in np.quantile(rises, [level, 1 - level]))
    documents, rise = len(measured.slices), adaptive[1] - adaptive[0]
    status: Status = "undecided"
    if documents >= fewest:
        status = "failed" if low > limits.error else "passed" if high < limits.error else status
    text = (
        f"calibration error of the next token {adaptive[0]:.3f} before, {adaptive[1]:.3f} after "
        f"({rise:+.3f}, {low:+.3f} to {high:+.3f}), margin {limits.error:g}"
    )
    check = Check(
        name="calibration", status=status, text=text, dense=adaptive[0], slim=adaptive[1],
        difference=rise, interval=(low, high), limit=limits.error,
        items=len(measured.text), clusters=documents,
    )  # fmt: skip
    names = ("dense", "slim")
    return [check], {
        "ece": dict(zip(names, ece, strict=True)),
        "adaptive": dict(zip(names, adaptive, strict=True)),
    }


def _resampled_rises(measured: Measured, seed: int) -> Floats:
    """Rises of the adaptive error, documents drawn with replacement [RESAMPLES]."""
    draw = np.random.default_rng(seed)
    count = len(measured.slices)
    places: list[NDArray[np.int64]] = [np.flatnonzero(measured.text == i) for i in range(count)]
    rises = []
    for _ in range(RESAMPLES):
        at = np.concatenate([places[i] for i in draw.integers(count, size=count)])
        before, after = (
            adaptive_error(confidence[at], right[at])
            for confidence, right in zip(measured.confidence, measured.right, strict=True)
        )
        rises.append(after - before)
    return np.array(rises)
