"""How far logits lie from those they should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from atp_export.verification.checks import Check, at_most
from atp_export.verification.observe import Asked, Rows
from atp_export.verification.reference import Floats, Reference

Pair = tuple[Rows, Floats]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Absolute differences of logits: the largest, their mean, the root of their mean square."""

    largest: float
    mean: float
    rms: float


def distance(pairs: Iterable[Pair]) -> Distance:
    """Of rows from those expected; one logit that is not a number makes all three so, as no rows
    do."""
    found = []
    for rows, expected in pairs:
        off = np.abs(rows.logits - expected)
        found.append((off.max(), off.mean(), np.square(off).mean(), len(off)))
    if not found:
        return Distance(largest=np.nan, mean=np.nan, rms=np.nan)
    largest, means, squares, counts = (np.array(column) for column in zip(*found, strict=True))
    return Distance(
        largest=float(largest.max()),
        mean=float(np.average(means, weights=counts)),
        rms=float(np.sqrt(np.average(squares, weights=counts))),
    )


class Truth:
    """A reference's logits at every position that is asked for, and their spread."""

    def __init__(self, reference: Reference, asked: Asked) -> None:
        self._rows = [
            dict(zip(positions, reference.logits(text, positions), strict=True))
            for text, positions in zip(asked.texts, asked.positions, strict=True)
        ]
        self.spread = float(np.stack([*self._rows[0].values()]).std())

    def of(self, rows: Rows) -> Floats:
        """What these rows should be, [n, V]."""
        return np.stack([self._rows[rows.text][position] for position in rows.positions])


def logit_checks(
    what: str, pairs: Sequence[Pair], spread: float, bound: float, largest: float | None = None
) -> list[Check]:
    """One check for each way of reading: the root mean square of the differences over the logits'
    spread, and with `largest` the largest one too."""
    checks = []
    for how in dict.fromkeys(rows.how for rows, _ in pairs):
        off = distance(pair for pair in pairs if pair[0].how == how)
        says = f"{what}, read {how}: logits differ by {off.rms / spread:.2e} of their spread"
        checks.append(at_most(f"{what}, {how}", off.rms / spread, bound, says))
        if largest is not None:
            says = (
                f"{what}, read {how}: a logit differs by {off.largest / spread:.2e} of the spread"
            )
            checks.append(at_most(f"{what}, {how}, largest", off.largest / spread, largest, says))
    return checks
