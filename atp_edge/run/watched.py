"""Long work says how far it is, wherever it is done.

The display is ambient, as logging is: what computes need not know who watches, and where nobody
does nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Watcher(Protocol):
    """Who shows how far the work is."""

    def stage(self, name: str, number: int, of: int) -> None:
        """A stage of a run begins."""

    def expect(self, works: Sequence[tuple[str, float]]) -> None:
        """What will be done, in order, by name, and how long it takes against one another."""

    def work(self, name: str, total: int) -> None:
        """Work of so many parts begins, perhaps inside other work."""

    def advance(self, done: int) -> None:
        """So many parts of the work that was begun last are done."""

    def end(self) -> None:
        """The work that was begun last ends."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell this one of all work inside."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def underway(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Work of so many parts; call what is given at the end of each."""
    watcher, done = _watcher.get(), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if watcher is not None:
            watcher.advance(done)

    if watcher is not None:
        watcher.work(name, total)
    try:
        yield one_more
    finally:
        if watcher is not None:
            watcher.end()


def counted(things: Sequence[T], name: str) -> Iterator[T]:
    """The things, one after another, as work of so many parts."""
    with underway(name, len(things)) as one_more:
        for thing in things:
            yield thing
            one_more()


def tell_stage(name: str, number: int, of: int) -> None:
    """Say which stage of how many begins."""
    if (watcher := _watcher.get()) is not None:
        watcher.stage(name, number, of)


def tell_expected(works: Sequence[tuple[str, float]]) -> None:
    """Say what will be done, for an estimate of the time left."""
    if (watcher := _watcher.get()) is not None:
        watcher.expect(works)
