"""How long a run still takes: the time so far, over the share of the expected work that it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

LEAST_SECONDS = 5.0
"""Of measured work before anything is said."""


class TimeLeft:
    """Follows a list of works (name, units) in their order.

    A work that is skipped, because it was done before, is passed over when a later one begins.
    Units are relative: only what was measured says how long one takes.
    """

    def __init__(
        self,
        works: Sequence[tuple[str, float]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.works, self.clock = list(works), clock
        self.place, self.share = -1, 0.0
        self.done_units = self.done_seconds = 0.0
        self.began = 0.0

    def begin(self, name: str) -> None:
        """The next work of this name begins; other names are part of the one before."""
        places = range(self.place + 1, len(self.works))
        place = next((i for i in places if self.works[i][0] == name), None)
        if place is None:
            return
        if self.place >= 0:
            self.done_units += self.works[self.place][1]
            self.done_seconds += self.clock() - self.began
        self.place, self.share, self.began = place, 0.0, self.clock()

    def reach(self, name: str, share: float) -> None:
        """So much of a work is done, if it is the one that was begun last."""
        if self.place >= 0 and self.works[self.place][0] == name:
            self.share = min(1.0, share)

    def seconds(self) -> float | None:
        """What is left, or None before enough was measured."""
        if self.place < 0:
            return None
        units = self.works[self.place][1]
        spent = self.done_seconds + self.clock() - self.began
        done = self.done_units + self.share * units
        if spent < LEAST_SECONDS or done <= 0:
            return None
        left = (1 - self.share) * units + sum(u for _, u in self.works[self.place + 1 :])
        return spent / done * left


def in_words(seconds: float) -> str:
    """A time as a person says it: to the minute, or to ten seconds."""
    if seconds < 90:
        return f"{max(10, round(seconds / 10) * 10)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
