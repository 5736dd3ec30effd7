"""Triton's kernels or torch's, by name: both are rivals in one process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from atp_kernels.backend import Backend, backend_name

Choice = Backend | Literal["auto"]


def triton_absent(device: str) -> str | None:
    """Why Triton's kernels cannot run here; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install triton"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU, or TRITON_INTERPRET=1"
    return None


@contextmanager
def kernels_by(name: Choice) -> Iterator[None]:
    """The operators of atp_kernels run on this backend inside (auto: on what is chosen unasked)."""
    before = os.environ.get("ATP_KERNELS")
    os.environ["ATP_KERNELS"] = name
    backend_name.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["ATP_KERNELS"]
        else:
            os.environ["ATP_KERNELS"] = before
        backend_name.cache_clear()
