"""The one place that chooses what runs (`ATP_KERNELS=auto|joined|triton|torch`).

| phase, and its mask | joined (a GPU's default) | triton | torch (a CPU's default) |
|---|---|---|---|
| dense, recovery: none | plain | plain | plain |
| joint step: a fixed decision | narrow, one product | masked product | narrow, two products |
| generator step: numbers | plain, the mask on z | masked product | plain, the mask on z |
| what is elementwise | Triton's where it can run | the same | torch's |
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["joined", "triton", "torch"]
Products = Literal["plain", "joined", "masked"]
MaskKind = Literal["none", "fixed", "numbers"]
_CHOICES = ("auto", "joined", "triton", "torch")
logger = logging.getLogger(__name__)


@cache
def backend_name() -> Backend:
    """Which path runs, said once in the log. Raises ValueError for an unknown ATP_KERNELS."""
    choice = os.environ.get("ATP_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"ATP_KERNELS={choice!r}: expected auto, joined, triton or torch")
    device = torch.cuda.is_available() or _interpreted()
    if choice == "triton" and not (device and _has_triton()):
        raise ValueError(
            "ATP_KERNELS=triton needs triton and a CUDA device (or TRITON_INTERPRET=1); "
            "found none: install atp-edge[gpu] on a machine with a GPU, or leave it at auto"
        )
    name: Backend = ("joined" if device else "torch") if choice == "auto" else choice  # type: ignore[assignment]
    logger.info("masked LoRA runs on %s", name)
    return name


def products(x: Tensor, mask: MaskKind) -> Products:
    """How the products of a layer on x are made under such a mask."""
    name = backend_name()
    if mask == "none" or name == "torch":
        return "plain"
    if name == "triton":
        return "masked" if _runs_triton(x) else "plain"
    return "joined" if mask == "fixed" else "plain"


def fuses(x: Tensor) -> bool:
    """Whether elementwise parts on x run as Triton's kernels."""
    return backend_name() != "torch" and _has_triton() and _runs_triton(x)


def on_triton(x: Tensor) -> bool:
    """Whether masked products on x run as Triton's kernel: the choice, and a device that can."""
    return backend_name() == "triton" and _runs_triton(x)


def _runs_triton(x: Tensor) -> bool:
    return (x.is_cuda or _interpreted()) and x.dtype != torch.float64


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
