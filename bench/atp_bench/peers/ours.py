"""Our runtime as an engine: greedy, one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atp_export.runtime import Generation, Session, Tokens


class OurEngine:
    """One exported folder on atp_export.runtime."""

    def __init__(self, folder: Path, provider: str, threads: int | None) -> None:
        self.session = Session(folder, provider=provider, threads=threads)
        self.provider = self.session.provider
        self.vocabulary: int = self.session.vocabulary

    def start(self, capacity: int) -> _Run:
        return _Run(self.session.start(1, capacity))


class _Run:
    def __init__(self, state: Generation) -> None:
        self.state = state
        self.token: Any = None

    def first(self, prompt: Tokens) -> None:
        self.token = self.state.step(prompt[None], last_only=True).argmax(-1)

    def next(self) -> None:
        self.token = self.state.step(self.token).argmax(-1)
