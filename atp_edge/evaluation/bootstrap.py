"""95 % intervals by resampling (Efron's percentile bootstrap)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000


# Intervals and recovery


def resampled(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Items drawn with replacement [RESAMPLES, count]."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def middle(values: Floats) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(values: Floats) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron), 1,000 resamples of the items."""
    return middle(values[resampled(len(values))].mean(axis=1))
