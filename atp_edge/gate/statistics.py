"""Paired tests of a difference against a margin, clustered, with what they could have seen.

Sign: a positive difference means that the slim model is worse. Errors are clustered by document
(arXiv 2411.00640, eq. 4): items of one document are not independent. Where clusters are few, or of
uneven sizes, that formula is too sure: of nulls of 8 documents of 3 to 1,000 tokens, 14 % were
beyond 5 %. So residuals are scaled up by what their cluster has in the mean (CR2), and the degrees
of freedom are those of clusters whose means vary (Bell and McCaffrey 2002; Pustejovsky and Tipton,
arXiv 1601.01981). Differences of one size whose signs alone vary have lighter tails than any t: so
P is never below that of Fisher's randomization test, which turns the clusters' signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Status = Literal["passed", "failed", "undecided"]
_EXACT = 14
_MOST_TURNED = 64
"""Clusters beyond which the mean is as good as normal, whatever its parts are."""
POWER = 0.8
"""The chance with which the smallest difference that is reported would have been seen."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean per unit of weight, its standard error by clusters, and what it is of.

    degrees: of freedom of the error; by default those of clusters that weigh alike. sums, sizes:
    of the clusters [C], where they are known.
    """

    mean: float
    error: float
    clusters: int
    items: int
    degrees: float | None = None
    sums: Floats | None = field(default=None, repr=False, compare=False)
    sizes: Floats | None = field(default=None, repr=False, compare=False)

    @property
    def freedom(self) -> float:
        return self.clusters - 1 if self.degrees is None else self.degrees

    @property
    def told(self) -> bool:
        """Whether the mean is a number."""
        return math.isfinite(self.mean)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A difference against its margin.

    p_worse: of no more than the margin; Holm-adjusted in a family. interval: 1 - 2 level.
    detectable: the smallest difference that the test, as one of its family, would have seen with
    80 % power; passes: with that power a difference as far below the margin passes. suspected:
    undecided, and by itself beyond the margin. family: how many are judged together.
    """

    difference: Difference
    margin: float
    status: Status
    p_worse: float
    interval: tuple[float, float]
    detectable: float
    passes: float
    suspected: bool
    family: int

    @property
    def clusters_needed(self) -> int:
        """Clusters with which a true difference of zero would be told from the margin."""
        held = self.difference.clusters
        if not math.isfinite(self.passes) or self.margin <= 0:
            return 0
        return max(held, math.ceil(held * (self.passes / self.margin) ** 2))


def clustered(differences: Any, weights: Any, clusters: Any) -> Difference:
    """Sum of differences [N] over sum of weights [N], of items in clusters [N]."""
    sums, sizes = np.asarray(differences, float), np.asarray(weights, float)
    _, of = np.unique(np.asarray(clusters), return_inverse=True)
    if not len(sums) or sizes.sum() <= 0:
        return Difference(mean=math.nan, error=math.inf, clusters=0, items=0)
    count = int(of.max()) + 1
    mean = float(sums.sum() / sizes.sum())
    sums_of: Floats = np.bincount(of, sums, minlength=count).astype(np.float64)
    sizes_of: Floats = np.bincount(of, sizes, minlength=count).astype(np.float64)
    weight = sizes_of / sizes.sum()
    if weight.max() == 1 or not math.isfinite(mean):  # One cluster is all of it, or no number is.
        return Difference(mean=mean, error=math.inf, clusters=count, items=len(sums))
    residuals = sums_of - mean * sizes_of
    error = math.sqrt(float((residuals**2 / (1 - weight)).sum())) / float(sizes.sum())
    return Difference(
        mean=mean, error=error, clusters=count, items=len(sums), degrees=_degrees(weight),
        sums=sums_of, sizes=sizes_of,
    )  # fmt: skip


def _degrees(weight: Floats) -> float:
    """Degrees of freedom of CR2's error of a mean over clusters of these weights [C], of sum 1.

    With residuals M e, M = I - w 1', the squared error is e' K e, K = M' A M with A = 1 / (1 - w)
    on the diagonal; with B = D K D of clusters whose sums vary as their weights (D = diag(w)), Bell
    and McCaffrey's degrees are tr(B)^2 / tr(B^2). K_ij = a_i [i = j] - u_i - u_j + s, with u = A w
    and s = w' A w, so that no matrix is made.
    """
    a, spread = 1 / (1 - weight), weight**2
    u = a * weight
    s = float(u @ weight)
    diagonal = a - 2 * u + s
    whole, first, second = (float(spread @ x) for x in (np.ones_like(u), u, u**2))
    beside = s * s * whole**2 + 2 * whole * second + 2 * first**2 - 4 * s * whole * first
    squares = float(spread**2 @ (diagonal**2 - (s - 2 * u) ** 2)) + beside
    return float(spread @ diagonal) ** 2 / squares


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
    told = [n for n, one in family.items() if one.clusters >= max(fewest, 2) and one.told]
    alarms = dict(zip(told, holm([_tail(family[n], margin) for n in told]), strict=True))
    return {
        name: _judge(one, margin, level, alarms.get(name), max(1, len(told)))
        for name, one in family.items()
    }


def _judge(
    one: Difference, margin: float, level: float, p_worse: float | None, family: int
) -> Judged:
    """p_worse: None where there are too few clusters to tell."""
    status: Status = "undecided"
    if one.clusters and not one.told:  # What was asked did not answer with a number.
        status, p_worse = "failed", 0.0
    elif p_worse is not None and p_worse < level:
        status = "failed"
    elif p_worse is not None and _tail(one, margin, above=False) < level:
        status = "passed"
    several = one.clusters > 1 and one.told
    reach = one.error * _quantile(1 - level, one) if several else math.inf
    alone = several and _tail(one, margin) < level
    return Judged(
        difference=one,
        margin=margin,
        status=status,
        p_worse=1.0 if p_worse is None else p_worse,
        interval=(one.mean - reach, one.mean + reach),
        detectable=detectable(one, level / family),
        passes=detectable(one, level),
        suspected=alone and status == "undecided",
        family=family,
    )


def _tail(one: Difference, margin: float, *, above: bool = True) -> float:
    """P of a mean as large as this (or, not above, as small) where the true one is the margin."""
    beyond = (one.mean - margin) * (1 if above else -1)
    if one.error == 0:
        p = 0.0 if beyond > 0 else 1.0
    else:
        p = float(stats.t.sf(beyond / one.error, one.freedom))
    if one.sums is None or one.sizes is None or one.clusters > _MOST_TURNED:
        return p
    return max(p, _turned((one.sums - margin * one.sizes) * (1 if above else -1)))


def _least_tail(one: Difference) -> float:
    """The P that no difference is below."""
    turned = one.sums is not None and one.clusters <= _MOST_TURNED
    return 2.0 ** -min(one.clusters, _EXACT) if turned else 0.0


def _turned(deviations: Floats) -> float:
    """P of a sum as large as that of these deviations [C] where each might as well have the other
    sign: over all signs of 14 clusters or fewer, else over 16,384 that are drawn."""
    sums = _signs(len(deviations)) @ deviations
    return float((sums >= sums[0] - 1e-9 * np.abs(deviations).sum()).mean())


@lru_cache(maxsize=32)
def _signs(count: int) -> Floats:
    """Ways to sign so many clusters, a row each; the first leaves them as they are."""
    if count <= _EXACT:
        turned = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    else:
        turned = np.random.default_rng(0).integers(0, 2, (2**_EXACT, count))
        turned[0] = 0
    signs: Floats = (1 - 2 * turned).astype(np.float64)
    return signs


def _quantile(share: float, one: Difference) -> float:
    return float(stats.t.ppf(share, one.freedom))


def detectable(one: Difference, level: float, power: float = POWER) -> float:
    """The smallest true difference from zero that is seen with this power; infinite where so few
    clusters are seen never, however much they lose."""
    if one.clusters < 2 or not one.told or _least_tail(one) >= level:
        return math.inf
    return one.error * (_quantile(1 - level, one) + _quantile(power, one))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): below the level with at most the level's chance of any false
    one."""
    order = np.argsort(p_values)
    found, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        found[place] = min(1.0, largest)
    return found


def fewest_that_tell(limit: float, level: float) -> int:
    """Of independent parts: how many, so that one at least is hit, but for a chance of `level`, if
    the share that is hit were the limit (of so many without a hit, the exact bound of Clopper and
    Pearson is the limit). 0 for a limit of 0 or of 1 and more."""
    if not 0 < limit < 1:
        return 0
    return math.ceil(math.log(level) / math.log1p(-limit))


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
