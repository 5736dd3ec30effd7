"""How a run is shown: as text, quietly, or as JSON lines; and whether a tracker has it too."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.run.json_lines import JsonLines
from atp_edge.run.progress import Progress, Terminal
from atp_edge.run.watched import watched_by

if TYPE_CHECKING:
    from atp_edge.config import Config

Log = Annotated[
    Literal["text", "json", "quiet", "verbose"],
    typer.Option(metavar="HOW", help="text, json (a line an event), quiet or verbose"),
]
Track = Annotated[
    str | None,
    typer.Option(metavar="WHERE", help="also to tensorboard, wandb or mlflow"),
]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What `--log` and `--track` ask for."""

    log: Literal["text", "json", "quiet", "verbose"] = "text"
    track: str | None = None

    def check(self) -> None:
        """Raise ValueError for a tracker that cannot be had."""
        if self.log == "verbose":
            logging.getLogger().setLevel(logging.INFO)
        if self.track is not None:
            from atp_edge.training.trackers import check_tracker

            check_tracker(self.track)

    @contextmanager
    def progress(self, console: Console, config: Config) -> Iterator[Progress]:
        """Where the stages say how far they are."""
        with self._progress(console) as shown:
            if self.track is None:
                yield shown
                return
            from atp_edge.training.trackers import Tracked, check_tracker

            tracked = Tracked(shown, check_tracker(self.track), config)
            try:
                yield tracked
            finally:
                tracked.finish({})

    @contextmanager
    def _progress(self, console: Console) -> Iterator[Progress]:
        if self.log in ("text", "verbose"):
            with Terminal(console) as terminal:
                yield terminal
        else:
            lines = self._lines(console)
            with watched_by(lines):
                yield lines

    def end(self, console: Console, metrics: Mapping[str, Any], sentence: str) -> None:
        """What a machine reads at the end, or a quiet person: the verdict."""
        if self.log == "quiet":
            console.print(Text(sentence))
        elif self.log == "json":
            self._lines(console).put("end", verdict=sentence, metrics=dict(metrics))

    def say(self, console: Console, text: str, style: str = "") -> None:
        """A sentence: a line, or an event."""
        if self.log == "json":
            self._lines(console).say(text)
        else:
            console.print(Text(text, style=style))

    def event(self, console: Console, name: str, **values: Any) -> None:
        """What a machine reads."""
        self._lines(console).put(name, **values)

    def pushed(self, console: Console, address: str) -> None:
        """That it was uploaded, and where to."""
        if self.for_people:
            console.print(Text(f"pushed: {address}"), soft_wrap=True)
        elif self.log == "json":
            self._lines(console).put("pushed", address=address)

    @property
    def for_people(self) -> bool:
        """Whether tables are printed."""
        return self.log in ("text", "verbose")

    def _lines(self, console: Console) -> JsonLines:
        if self.log == "quiet":
            return JsonLines(lambda line: None)
        return JsonLines(lambda line: console.print(Text(line), soft_wrap=True))
