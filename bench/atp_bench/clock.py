"""The clock of timed torch code."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds, after all that a GPU was given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
