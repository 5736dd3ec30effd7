"""Ratios of two rivals measured in the same rounds, so that a busy second falls on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PairedRatio:
    """The median over rounds of a ratio within a round, and the quartiles around it."""

    median: float
    quartiles: tuple[float, float]


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> PairedRatio:
    """above over below, round by round. Raises ValueError for unequal numbers of rounds."""
    low, middle, high = np.percentile(ratios(above, below), [25, 50, 75]).tolist()
    return PairedRatio(median=middle, quartiles=(low, high))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above over below in every round. Raises ValueError for unequal numbers of rounds."""
    return [a / b for a, b in zip(above, below, strict=True)]
