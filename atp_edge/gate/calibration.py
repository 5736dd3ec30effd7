"""Whether the models are as often right as they are sure, before and after.

The error is a sum of sizes, so that chance adds to it, most where there was little. Of 8 documents
a model that is as sure as it is right seems off by 0.06, and one that is off by 0.06 seems hardly
worse. So the interval is wider by what chance may have added to either (`by_chance`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from atp_edge.evaluation.task_scores import calibration_error
from atp_edge.gate.measured_text import Measured
from atp_edge.gate.results import Check
from atp_edge.gate.settings import CalibrationLimits
from atp_edge.gate.statistics import Floats, Status

ADAPTIVE_BINS = 15
RESAMPLES = 200


def adaptive_error(confidence: Floats, right: Floats) -> float:
    """Calibration error over 15 bins that hold as many tokens each (arXiv 1904.01685)."""
    gaps = [len(b) * abs(right[b].mean() - confidence[b].mean()) for b in _bins(confidence)]
    return float(sum(gaps) / len(confidence))


def by_chance(confidence: Floats, right: Floats, text: NDArray[np.int64]) -> float:
    """The adaptive error that chance alone would give, at most what it adds to one: the mean size
    of every bin's error, which is clustered by document. text: of every token."""
    documents = int(text.max()) + 1
    found = 0.0
    for b in _bins(confidence):
        off = right[b] - confidence[b]
        sums = np.bincount(text[b], off - off.mean(), minlength=documents)
        found += math.sqrt(2 / math.pi * float((sums**2).sum()) * documents / (documents - 1))
    return found / len(confidence)


def _bins(confidence: Floats) -> list[NDArray[np.int64]]:
    order = np.argsort(confidence, kind="stable")
    return [b for b in np.array_split(order, ADAPTIVE_BINS) if len(b)]


def check_calibration(
    measured: Measured, limits: CalibrationLimits, level: float, fewest: int, seed: int
) -> tuple[list[Check], dict[str, Any]]:
    """The rise of the next token's calibration error, its interval by resampling documents and
    wider by what chance may have added before (to its end) and after (to its start)."""
    pairs = list(zip(measured.confidence, measured.right, strict=True))
    ece, adaptive = (
        [of(confidence, right) for confidence, right in pairs]
        for of in (calibration_error, adaptive_error)
    )
    documents, rise = len(measured.slices), adaptive[1] - adaptive[0]
    low, high = -math.inf, math.inf
    if documents > 1:
        spread = float(_resampled_rises(measured, seed).std(ddof=1))
        reach = float(stats.t.ppf(1 - level, documents - 1)) * spread
        before, after = (by_chance(*pair, measured.text) for pair in pairs)
        low, high = rise - reach - after, rise + reach + before
    status: Status = "undecided"
    if not math.isfinite(rise):
        status = "failed"
    elif documents >= fewest:
        status = "failed" if low > limits.error else "passed" if high < limits.error else status
    interval = f", {low:+.3f} to {high:+.3f}" if documents > 1 else ", of one document"
    text = (
        f"calibration error of the next token {adaptive[0]:.3f} before, {adaptive[1]:.3f} after "
        f"({rise:+.3f}{interval}), margin {limits.error:g}"
    )
    if not math.isfinite(rise):
        text += ": no number"
    elif status == "undecided":
        text += ": not told; more documents, or longer ones, would tell"
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
