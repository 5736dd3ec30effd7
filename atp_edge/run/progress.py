"""What a person watching a run sees: one bar a phase, with loss, kept share and time left."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars
from rich.text import Text

from atp_edge.run.history import Record

PLAIN_LINE_EVERY = 20


class Progress(Protocol):
    """Where a stage says how far it is."""

    def say(self, text: str) -> None: ...
    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None: ...
    def record(self, record: Record) -> None: ...


class Terminal:
    """Progress on a terminal of 80 columns; plain lines where there is none."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = RichBars(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.task: TaskID | None = None
        self.first = 0
        self.target: float | None = None

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.bars.console.print(Text.assemble(("·", "dim"), " ", text), highlight=False)

    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None:
        self.first, self.target = first, target_share
        self.task = self.bars.add_task(name, total=last - first, figures="", start=True)

    def record(self, record: Record) -> None:
        figures = f"loss {record.loss:.3f}"
        if record.kept_share is not None and self.target is not None:
            figures += f" kept {record.kept_share:.3f}/{self.target:.3f}"
        assert self.task is not None
        done = record.step + 1 - self.first
        self.bars.update(self.task, completed=done, figures=figures)
        if not self.console.is_terminal and done % PLAIN_LINE_EVERY == 0:
            self.console.print(f"  {record.phase} step {record.step + 1}: {figures}")
