"""What a person watching a run sees: the stage and the time left, a bar a phase, a moving line for
all that takes seconds. Where there is no terminal: a plain line now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import Progress as RichRows
from rich.progress import ProgressColumn, SpinnerColumn, Task, TaskID
from rich.text import Text

from atp_edge.run.history import Record
from atp_edge.run.time_left import TimeLeft, in_words
from atp_edge.run.watched import watched_by

PLAIN_LINE_SECONDS = 30.0
SHOWN_AFTER_SECONDS = 1.0
"""Work that is done earlier never gets a row of its own."""
BAR_WIDTH = 16


class Progress(Protocol):
    """Where a stage says how far it is."""

    def say(self, text: str) -> None: ...
    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None: ...
    def record(self, record: Record) -> None: ...


class Logged:
    """Progress as the lines of Python's own log, for whoever calls atp-edge from a program."""

    def __init__(self) -> None:
        self.log = logging.getLogger("atp_edge")

    def say(self, text: str) -> None:
        self.log.info(text)

    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None:
        self.log.info("%s: steps %d to %d", name, first, last)

    def record(self, record: Record) -> None:
        self.log.debug("%s step %d: loss %.3f", record.phase, record.step + 1, record.loss)


class _Row(ProgressColumn):
    """A whole row within 80 columns: name, bar, count, figures, time."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            passed = int(task.elapsed or 0)
            return Text(f"{task.description[:62]} {passed // 60}:{passed % 60:02d}", style="dim")
        total = int(task.total)
        share = task.completed / total if total else 1.0
        filled = round(BAR_WIDTH * min(1.0, share))
        parts = [
            Text(f"{task.description[:22]:<14} "),
            Text("━" * filled, style="green"),
            Text("━" * (BAR_WIDTH - filled), style="dim"),
            Text(f" {int(task.completed)}/{total} {task.fields['figures']}"),
        ]
        left = task.time_remaining
        if left and not task.finished and task.fields.get("timed", True):
            parts.append(Text(f" {int(left) // 60}:{int(left) % 60:02d}", style="cyan"))
        return Text.assemble(*parts)


class Terminal:
    """Progress on a terminal of 80 columns; plain lines where there is none."""

    def __init__(self, console: Console) -> None:
        self.console = console
        shown = console.is_terminal
        self.rows = RichRows(SpinnerColumn(), _Row(), console=console, disable=not shown)
        self.task: TaskID | None = None
        self.busy: TaskID | None = None
        self.overall: TaskID | None = None
        self.works: list[_Work] = []
        self.phase_name, self.first, self.total = "", 0, 0
        self.step, self.in_phase = "", False
        """Whether a phase makes its steps: its bar, then, is what is done now."""
        self.target: float | None = None
        self.left = TimeLeft()
        self.doing = ""
        self.said_at = self.began_at = time.monotonic()
        self.stopping = threading.Event()
        self.open = ExitStack()

    def __enter__(self) -> Self:
        self.rows.start()
        self.open.enter_context(watched_by(self))
        if not self.console.is_terminal:
            threading.Thread(target=self._now_and_then, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        self.open.close()
        for task in (self.busy, self.overall):
            if task is not None:
                self.rows.remove_task(task)
        self.rows.stop()

    def say(self, text: str) -> None:
        self.console.print(Text.assemble(("·", "dim"), " ", text), highlight=False)
        self.in_phase = False  # A phase that ends at its best step says so; one that goes on steps.
        # What is done now is said as "reading ..."; a note is not.
        if not self.doing or text.partition(" ")[0].endswith("ing"):
            self._do(text)

    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None:
        self.phase_name, self.first, self.target = name, first, target_share
        self.total = last - first
        self.in_phase, self.step = self.total > 0, name
        self._rest()
        self.task = self.rows.add_task(name, total=self.total, figures="")
        self.left.begin(name)
        self._do(name)

    def record(self, record: Record) -> None:
        figures = f"loss {record.loss:.3f}"
        if record.kept_share is not None and self.target is not None:
            figures += f" kept {record.kept_share:.3f}/{self.target:.3f}"
        assert self.task is not None
        done = record.step + 1 - self.first
        self.rows.update(self.task, completed=done, figures=figures)
        self._reached(self.phase_name, done, self.total, figures)
        self.in_phase = done < self.total
        if self.in_phase:
            self.doing = self.step = f"{self.phase_name} {done}/{self.total}"
        else:
            self._do(f"after {self.phase_name}")

    def stage(self, name: str, number: int, of: int) -> None:
        """A watcher's: the stage is what the first row shows."""
        if self.console.is_terminal:
            title = f"stage {number} of {of}: {name}"
            if self.overall is None:
                self.overall = self.rows.add_task(title, total=of, figures="", timed=False)
            self.rows.update(self.overall, description=title, completed=number - 1)
        else:
            self._plain(f"stage {number} of {of}: {name}{self._in_all()}")
        self.left.begin(name)
        self._do(name)

    def expect(self, works: Sequence[tuple[str, float]]) -> None:
        """A watcher's."""
        self.left = TimeLeft(works)

    def work(self, name: str, total: int) -> None:
        """A watcher's: a row once it takes longer than a moment."""
        if not self.works:
            self.left.begin(name)
        self.works.append(_Work(name, total))

    def advance(self, done: int) -> None:
        """A watcher's."""
        work = self.works[-1]
        work.done = done
        if work.row is None and time.monotonic() - work.began > SHOWN_AFTER_SECONDS:
            self._rest()
            work.row = self.rows.add_task(work.name, total=work.total, figures="")
        if work.row is not None:
            self.rows.update(work.row, completed=done)
        if len(self.works) == 1:
            self._reached(work.name, done, work.total, "")

    def end(self) -> None:
        """A watcher's."""
        work = self.works.pop()
        if work.row is not None:
            self.rows.remove_task(work.row)
        if self.in_phase:
            self._rest()
            self.doing, self.began_at = self.step, time.monotonic()
        else:
            self._do(f"after {work.name}")

    def _do(self, what: str) -> None:
        """What is done now, and has no bar: a moving line says it."""
        self.doing, self.began_at = what, time.monotonic()
        if not self.console.is_terminal or self.works:
            return
        self._rest()
        self.busy = self.rows.add_task(what, total=None, figures="")

    def _rest(self) -> None:
        if self.busy is not None:
            self.rows.remove_task(self.busy)
            self.busy = None

    def _reached(self, name: str, done: int, total: int, figures: str) -> None:
        if self.busy is not None and done < total:
            self._rest()
        self.left.reach(name, done / total if total else 1.0)
        if self.overall is not None:
            self.rows.update(self.overall, figures=self._in_all().lstrip(", "))
        if time.monotonic() - self.said_at > PLAIN_LINE_SECONDS:
            self._plain(f"{name} {done}/{total} {figures}".rstrip() + self._in_all())

    def _in_all(self) -> str:
        seconds = self.left.seconds()
        return "" if seconds is None else f", about {in_words(seconds)} left in all"

    def _plain(self, text: str) -> None:
        self.said_at = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(Text(f"  {text}"), soft_wrap=True)

    def _now_and_then(self) -> None:
        """For whoever reads a log: nothing is silent for longer than `PLAIN_LINE_SECONDS`."""
        while not self.stopping.wait(1.0):
            what, began = self.now()
            passed = time.monotonic() - began
            if min(passed, time.monotonic() - self.said_at) > PLAIN_LINE_SECONDS:
                self._plain(f"{what or 'working'}: {in_words(passed)} so far{self._in_all()}")

    def now(self) -> tuple[str, float]:
        """What is done now, how far it is where that is counted, and since when."""
        for work in self.works[-1:]:
            return f"{work.name} {work.done}/{work.total}", work.began
        return self.doing, self.began_at


class _Work:
    """Work that was begun, and its row, if it has one yet."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.began = name, total, 0, time.monotonic()
        self.row: TaskID | None = None
