"""Progress for machines: one JSON object a line, each with its time and its event."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from atp_edge.run.history import Record
from atp_edge.run.time_left import TimeLeft


class JsonLines:
    """Events `say`, `stage`, `phase`, `step` (a record of the history), `work`, and what `put` is
    given. `seconds_left`: of the whole run, once it can be said."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write
        self.left = TimeLeft()
        self.phase_name, self.first, self.total = "", 0, 1
        self.depth = 0

    def put(self, event: str, **values: Any) -> None:
        """One line; null for a number that is none: JSON has no NaN."""
        line = {"time": round(time.time(), 3), "event": event} | values
        self.write(json.dumps(_finite(line), allow_nan=False))

    def say(self, text: str) -> None:
        self.put("say", text=text)

    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None:
        self.phase_name, self.first, self.total = name, first, last - first
        self.left.begin(name)
        self.put("phase", name=name, first=first, last=last, target_share=target_share)

    def record(self, record: Record) -> None:
        self.left.reach(self.phase_name, (record.step + 1 - self.first) / self.total)
        seconds = self.left.seconds()
        left = {} if seconds is None else {"seconds_left": round(seconds)}
        self.put("step", **asdict(record), **left)

    def stage(self, name: str, number: int, of: int) -> None:
        """A watcher's."""
        self.left.begin(name)
        self.put("stage", name=name, number=number, of=of)

    def expect(self, works: Sequence[tuple[str, float]]) -> None:
        """A watcher's."""
        self.left = TimeLeft(works)

    def work(self, name: str, total: int) -> None:
        """A watcher's: what lies inside other work is not told."""
        self.depth += 1
        if self.depth == 1:
            self.left.begin(name)
            self.put("work", name=name, total=total)

    def advance(self, done: int) -> None:
        """A watcher's."""

    def end(self) -> None:
        """A watcher's."""
        self.depth -= 1


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
