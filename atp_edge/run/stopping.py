"""A signal that comes while work is done which must not be left half-way is heard at its end, and
says what is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from atp_edge.run.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def saying(saved: Callable[[], str]) -> Iterator[None]:
    """Note on a Stopped what is saved, and how to go on."""
    try:
        yield
    except Stopped as stopped:
        stopped.add_note(saved())
        raise


@contextmanager
def heard_later(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Hold back SIGINT and SIGTERM; what is given says whether one came, and the block should end.

    After the block it is raised again, for whoever handled it before. A second one is not held
    back. Outside the main thread, and for signals that are ignored, nothing changes.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, frame: object) -> None:
        put_back()
        came.append(number)
        with suppress(RuntimeError):  # Of an output that the signal came into the middle of.
            name = signal.Signals(number).name
            say(f"{name}: saving after this step (again: stop without saving)")

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        put_back()
    if came:
        signal.raise_signal(came[0])
