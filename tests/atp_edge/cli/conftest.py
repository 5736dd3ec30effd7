"""What tests of commands share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """What `main` sets is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = sys.unraisablehook
    yield
    sys.unraisablehook = shown
    for number, handler in before.items():
        signal.signal(number, handler)
