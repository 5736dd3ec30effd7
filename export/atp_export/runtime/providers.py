"""Execution providers of ONNX Runtime: those that can run here, and not only are in its package."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import onnxruntime as ort

logger = logging.getLogger(__name__)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ONE_NODE = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""A serialized model of one Identity, as onnx.helper makes it: to import onnx takes 30 MB."""
_NEEDS = "it wants its CUDA and cuDNN libraries (pip install 'onnxruntime-gpu[cuda,cudnn]')"


@cache
def usable_providers() -> list[str]:
    """Those that can run here, the fastest first. Says, once, why a GPU is left unused."""
    if CUDA not in ort.get_available_providers() or not has_device():
        return [CPU]
    if not starts(CUDA):
        logger.warning("ONNX Runtime's %s is there and does not start: %s", CUDA, _NEEDS)
        return [CPU]
    return [CUDA, CPU]


def has_device() -> bool:
    """Whether a driver of NVIDIA's is there, by its devices; where those are no files there may
    be one, and `starts` tells."""
    if os.name == "nt":
        return True
    devices = Path("/dev")
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


@cache
def starts(provider: str) -> bool:
    """Whether ONNX Runtime runs a model on it: it falls back to the CPU without an error."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # Fatal alone.
    session = ort.InferenceSession(ONE_NODE, options, providers=[provider])
    return session.get_providers()[0] == provider


def provider_of(asked: str) -> str:
    """The provider to run on; `auto`: the fastest that can. Raises ValueError for one that
    cannot."""
    if asked == "auto":
        return usable_providers()[0]
    available = ort.get_available_providers()
    if asked not in available:
        raise ValueError(f"provider {asked!r}: this ONNX Runtime has {', '.join(available)}")
    if not starts(asked):
        raise ValueError(f"provider {asked!r} does not start here: {_NEEDS}")
    return asked
