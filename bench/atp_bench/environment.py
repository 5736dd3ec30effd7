"""What a measurement was taken on: enough to compare two figures, nothing that names a person."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import torch

PACKAGES = (
    "atp-edge",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "optimum",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "triton",
)
# Providers that ONNX Runtime lists because it was built with them, device or not.
_NEED_CUDA = frozenset({"CUDAExecutionProvider", "TensorrtExecutionProvider"})


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One machine at one time: no host name, no user name, no path."""

    date: str
    os: str
    python: str
    cpu: str
    cores: int
    torch_threads: int
    memory_bytes: int
    cuda_device: str | None
    providers: tuple[str, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"providers": list(self.providers)}


def environment() -> Environment:
    """Describe this machine as this process may use it (cores and memory it is allowed)."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=cpu_model(),
        cores=usable_cores(),
        torch_threads=torch.get_num_threads(),
        memory_bytes=usable_memory_bytes(),
        cuda_device=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        providers=usable_providers(),
        versions=installed_versions(),
    )


def installed_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed, in the order asked."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name: from Linux's cpuinfo, else what Python's platform module knows."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory this process may use: the machine's, or its cgroup v2 limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def cuda_device_count() -> int:
    """GPUs that the CUDA driver sees, whichever build of torch is installed; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def usable_providers() -> tuple[str, ...]:
    """ONNX Runtime's providers in its order of preference, less those that have no device here."""
    no_gpu = cuda_device_count() == 0
    return tuple(
        name
        for name in onnxruntime.get_available_providers()
        if not (no_gpu and name in _NEED_CUDA)
    )
