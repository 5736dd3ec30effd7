"""What a run may take: the memory of a device, of the host, and room on the disk."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from atp_edge.pipeline.memory import DeviceKind

USABLE = 0.95
"""Of what there is: the rest is the system's, and the estimate's error."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Sizes in bytes. On a CPU the device's memory is the host's."""

    kind: DeviceKind
    name: str
    memory: float
    host: float
    disk: float
    quantizes: bool
    """Whether bitsandbytes is there; of a machine elsewhere it is taken to be."""


def device_of(asked: str | None, out: Path) -> Device:
    """The device at hand, or a GPU of the memory asked for (`80GB`); out: where the run will lie.

    Raises ValueError for what is no size.
    """
    host, disk = _host_memory(), float(shutil.disk_usage(_existing(out)).free)
    if asked is not None:
        size = parse_size(asked)
        # Of a machine that is elsewhere: its host and disk are not known here.
        return Device(
            kind="cuda",
            name=f"a GPU of {asked}",
            memory=size,
            host=math.inf,
            disk=math.inf,
            quantizes=True,
        )
    if torch.cuda.is_available():
        total = float(torch.cuda.mem_get_info()[1])
        name = torch.cuda.get_device_name()
        quantizes = importlib.util.find_spec("bitsandbytes") is not None
        return Device(
            kind="cuda", name=name, memory=total, host=host, disk=disk, quantizes=quantizes
        )
    return Device(kind="cpu", name="this CPU", memory=host, host=host, disk=disk, quantizes=False)


def parse_size(text: str) -> float:
    """Bytes of `24GB`, `22.5 GiB` or `500MB`. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|GiB|TB)\s*", text)
    if not found or not float(found[1]):
        raise ValueError(f"device memory {text!r}: expected a size such as 24GB or 80GB")
    return float(found[1]) * {"MB": 1e6, "GB": 1e9, "GiB": 2**30, "TB": 1e12}[found[2]]


def _host_memory() -> float:
    total = float(psutil.virtual_memory().total)
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(total, float(limit)) if limit.isdigit() else total


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
