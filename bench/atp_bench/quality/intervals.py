"""Figures with their 95 % intervals, and how they are compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atp_bench.quality.results import Result
from atp_edge.evaluation.bootstrap import Floats, middle, resampled


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure and its 95 % interval, where one can be told."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; where there is none, the value is both."""
        return self.interval or (self.value, self.value)

    @property
    def interval_text(self) -> str:
        return "{:.3f} to {:.3f}".format(*self.interval) if self.interval else ""


def mean_of_apart(figures: Sequence[Measured]) -> Measured:
    """Mean of figures that were measured apart from one another."""
    mean = statistics.mean(f.value for f in figures)
    intervals = [(f.value, *f.interval) for f in figures if f.interval]
    if len(intervals) < len(figures):
        return Measured(value=mean)
    below = math.hypot(*(value - low for value, low, _ in intervals)) / len(intervals)
    above = math.hypot(*(high - value for value, _, high in intervals)) / len(intervals)
    return Measured(value=mean, interval=(mean - below, mean + above))


def recovery_of(result: Result) -> Measured:
    """A cell's recovery, and its interval over the test blocks: dense and slim answered all."""
    if not result.block_losses:
        return Measured(value=result.recovery)
    drawn = _drawn_recoveries(result.dense_block_losses, result.block_losses)
    return Measured(value=result.recovery, interval=middle(drawn))


def lead_over(ours: Result, rival: Result) -> Measured:
    """Recovery less the rival's, and its interval over the test blocks: both answered all.

    Both against our dense model: a rival of another LoRA rank was tuned beside another one.
    """
    value = ours.recovery - ours.dense_perplexity / rival.perplexity
    if not (ours.block_losses and rival.block_losses):
        return Measured(value=value)
    mine, theirs = (
        _drawn_recoveries(ours.dense_block_losses, result.block_losses) for result in (ours, rival)
    )
    return Measured(value=value, interval=middle(mine - theirs))


def _drawn_recoveries(dense: Sequence[float], slim: Sequence[float]) -> Floats:
    """Recovery over every resample of the test blocks: the same draws for every model."""
    gained = np.array(dense) - np.array(slim)
    return np.exp(gained[resampled(len(gained))].mean(axis=1))
