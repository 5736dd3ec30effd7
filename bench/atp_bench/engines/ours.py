"""Our runtime as an engine: greedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atp_export.runtime import Generation, Session, Tokens


class OurEngine:
    """One exported folder on atp_export.runtime."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.session = Session(folder, threads=threads)
        self.provider = self.session.provider
        self.vocabulary: int = self.session.vocabulary

    def start(self, batch: int, capacity: int) -> _Run:
        return _Run(Generation(self.session, batch, capacity))


class _Run:
    def __init__(self, state: Generation) -> None:
        self.state = state
        self.tokens: Any = None

    def first(self, prompts: Tokens) -> None:
        self.tokens = self.state.step(prompts, last_only=True).argmax(-1)

    def next(self) -> None:
        self.tokens = self.state.step(self.tokens).argmax(-1)
