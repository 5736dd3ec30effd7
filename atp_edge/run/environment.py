"""What a measurement ran on: enough to compare, nothing that names a person or a machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "onnx", "onnxruntime-gpu",
            "onnxruntime", "triton", "numpy")  # fmt: skip


def environment() -> dict[str, Any]:
    """CPU, memory, GPU, versions and date."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if version(name)},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
