"""Engines that generate with an exported folder: ours, and those it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from numpy.typing import NDArray

OURS, GENAI = "atp-edge", "onnxruntime-genai"


class Run(Protocol):
    """One generation of a fixed number of tokens a row; no row ends early."""

    def first(self, prompts: NDArray) -> None:  # type: ignore[type-arg]
        """Read the prompts [B, P] and choose every row's first token."""

    def next(self) -> None:
        """Choose one further token a row."""


class Engine(Protocol):
    """A loaded model."""

    provider: str
    vocabulary: int

    def start(self, batch: int, capacity: int) -> Run:
        """A generation of `batch` rows of at most `capacity` tokens."""


def open_engine(name: str, folder: Path, threads: int | None) -> Engine:
    """Load a folder with an engine. Raises ValueError for names that are not known here."""
    makers: dict[str, Callable[[Path, int | None], Engine]] = {OURS: _ours, GENAI: _genai}
    if name not in makers:
        raise ValueError(f"{name!r} is not an engine known here; expected {', '.join(makers)}")
    return makers[name](folder, threads)


# Imported where used: the memory of a process that measures one engine holds no other.
def _ours(folder: Path, threads: int | None) -> Engine:
    from atp_bench.engines.ours import OurEngine

    return OurEngine(folder, threads)


def _genai(folder: Path, threads: int | None) -> Engine:
    from atp_bench.engines.genai import GenaiEngine

    return GenaiEngine(folder, threads)
