"""The one place that chooses between Triton and torch (`ATP_KERNELS=auto|triton|torch`)."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]
logger = logging.getLogger(__name__)


@cache
def backend_name() -> Backend:
    """Which path runs, said once in the log. Raises ValueError for an unknown ATP_KERNELS."""
    choice = os.environ.get("ATP_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"ATP_KERNELS={choice!r}: expected auto, triton or torch")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    able = importlib.util.find_spec("triton") is not None and (
        torch.cuda.is_available() or interpreted
    )
    if choice == "triton" and not able:
        raise ValueError(
            "ATP_KERNELS=triton needs triton and a CUDA device (or TRITON_INTERPRET=1); "
            "found none: install atp-edge[gpu] on a machine with a GPU, or leave it at auto"
        )
    name: Backend = "triton" if able and choice != "torch" else "torch"
    logger.info("masked LoRA runs on %s", name)
    return name


def on_triton(x: Tensor) -> bool:
    """Whether an operator on x runs its Triton kernel: the choice, and a device that can."""
    able = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return able and x.dtype != torch.float64 and backend_name() == "triton"
