"""Paired tests of a difference against a margin, clustered, with what they could have seen.

Sign: a positive difference means that the slim model is worse. Errors are clustered by document
(arXiv 2411.00640, eq. 4): items of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Status = Literal["passed", "failed", "undecided"]
POWER = 0.8
"""The chance with which the smallest difference that is reported would have been seen."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean per unit of weight, its standard error by clusters, and what it is of."""

    mean: float
    error: float
    clusters: int
    items: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A difference against its margin.

    p_worse: of no more than the margin; Holm-adjusted in a family. interval: 1 - 2 level.
    detectable: the smallest difference that the test would have seen with 80 % power.
    """

    difference: Difference
    margin: float
    status: Status
    p_worse: float
    interval: tuple[float, float]
    detectable: float

    @property
    def clusters_needed(self) -> int:
        """Clusters with which a true difference of zero would be told from the margin."""
        held = self.difference.clusters
        if not math.isfinite(self.detectable) or self.margin <= 0:
            return 0
        return max(held, math.ceil(held * (self.detectable / self.margin) ** 2))


def clustered(differences: Any, weights: Any, clusters: Any) -> Difference:
    """Sum of differences [N] over sum of weights [N], of items in clusters [N]."""
    sums, sizes = np.asarray(differences, float), np.asarray(weights, float)
    _, of = np.unique(np.asarray(clusters), return_inverse=True)
    if not len(sums) or sizes.sum() <= 0:
        return Difference(mean=math.nan, error=math.inf, clusters=0, items=0)
    count = int(of.max()) + 1
    mean = float(sums.sum() / sizes.sum())
    residuals = np.bincount(of, sums - mean * sizes, minlength=count)
    error = math.inf
    if count > 1:
        error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / float(sizes.sum())
    return Difference(mean=mean, error=error, clusters=count, items=len(sums))


def judged(difference: Difference, *, margin: float, level: float, fewest: int) -> Judged:
    """One test. Passed: not worse by the margin; failed: worse by more; else undecided.

    With fewer than `fewest` clusters nothing is decided.
    """
    return judged_family({"": difference}, margin=margin, level=level, fewest=fewest)[""]


def judged_family(
    family: Mapping[str, Difference], *, margin: float, level: float, fewest: int
) -> dict[str, Judged]:
    """Several tests of one kind. "failed" is Holm-corrected: the level is that of any false alarm.

    "passed" is not: that all of them pass is claimed only where each one does.
    """
    told = [name for name, one in family.items() if one.clusters >= max(fewest, 2)]
    alarms = dict(zip(told, holm([_tail(family[n], margin) for n in told]), strict=True))
    return {name: _judge(one, margin, level, alarms.get(name)) for name, one in family.items()}


def _judge(one: Difference, margin: float, level: float, p_worse: float | None) -> Judged:
    """p_worse: None where there are too few clusters to tell."""
    status: Status = "undecided"
    if p_worse is not None and p_worse < level:
        status = "failed"
    elif p_worse is not None and 1 - _tail(one, margin) < level:
        status = "passed"
    reach = one.error * _quantile(1 - level, one.clusters) if one.clusters > 1 else math.inf
    return Judged(
        difference=one,
        margin=margin,
        status=status,
        p_worse=1.0 if p_worse is None else p_worse,
        interval=(one.mean - reach, one.mean + reach),
        detectable=detectable(one, level),
    )


def _tail(one: Difference, margin: float) -> float:
    """P of a mean as large as this where the true one is the margin."""
    if one.error == 0:
        return 0.0 if one.mean > margin else 1.0
    return float(stats.t.sf((one.mean - margin) / one.error, one.clusters - 1))


def _quantile(share: float, clusters: int) -> float:
    return float(stats.t.ppf(share, clusters - 1))


def detectable(one: Difference, level: float, power: float = POWER) -> float:
    """The smallest true difference from zero that is seen with this power."""
    if one.clusters < 2:
        return math.inf
    return one.error * (_quantile(1 - level, one.clusters) + _quantile(power, one.clusters))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): below the level with at most the level's chance of any false
    one."""
    order = np.argsort(p_values)
    found, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        found[place] = min(1.0, largest)
    return found


def mcnemar(lost: int, won: int) -> float:
    """One-sided exact P of so many right answers lost, where losing and winning are as likely
    (McNemar 1947; arXiv 2602.10144)."""
    if lost + won == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue)


def more_often(first: tuple[int, int], second: tuple[int, int]) -> float:
    """One-sided exact P (Fisher) that the first (hits, trials) hits no more often than the
    second."""
    table = [[first[0], first[1] - first[0]], [second[0], second[1] - second[0]]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)
