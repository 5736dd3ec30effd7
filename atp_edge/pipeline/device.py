"""What a run may take: the memory of a device, of the host, and room on the disk."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from atp_edge.pipeline.memory_need import DeviceKind
from atp_edge.run import ranks
from atp_edge.run.folder import RunFolder

USABLE = 0.95
"""Of what there is: the rest is the system's, and the estimate's error."""
ROOM = 0.8
"""Of the host's memory: what a proof takes before it goes by layers."""
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
    count: int = 1
    """Of such devices, one a rank."""
    free: float = math.inf
    """Bytes of the memory that nothing else takes now; infinite of a machine elsewhere."""


def device_of(asked: str | None, out: Path) -> Device:
    """The device at hand, or a GPU of the memory asked for (`80GB`; `8x80GB`: eight of them, one a
    rank); out: where the run will lie.

    Raises ValueError for what is no size.
    """
    if asked is not None:
        several = re.fullmatch(r"\s*([1-9]\d*)\s*x(.*)", asked)
        count, each = (int(several[1]), several[2].strip()) if several else (1, asked)
        size = parse_size(each, asked)
        # Of a machine that is elsewhere: its host and disk are not known here.
        return Device(
            kind="cuda",
            name=f"a GPU of {each}" if count == 1 else f"each of {count} GPUs of {each}",
            memory=size,
            host=math.inf,
            disk=math.inf,
            quantizes=True,
            count=count,
        )
    host, disk = host_memory(), float(shutil.disk_usage(_existing(out)).free) + _held(out)
    if torch.cuda.is_available():
        free, total = map(float, torch.cuda.mem_get_info())
        name = torch.cuda.get_device_name()
        quantizes = importlib.util.find_spec("bitsandbytes") is not None
        return Device(
            kind="cuda", name=name, memory=total, host=host, disk=disk, quantizes=quantizes,
            count=ranks.size(), free=free,
        )  # fmt: skip
    return Device(
        kind="cpu", name="this CPU", memory=host, host=host, disk=disk, quantizes=False,
        count=ranks.size(), free=free_memory(),
    )  # fmt: skip


def parse_size(text: str, given: str | None = None) -> float:
    """Bytes of `24GB`, `22.5 GiB` or `500MB`. Raises ValueError, naming what was given, for
    anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|GiB|TB)\s*", text)
    if not found or not float(found[1]):
        raise ValueError(
            f"device memory {given or text!r}: expected a size such as 24GB, or 8x80GB"
        )
    return float(found[1]) * {"MB": 1e6, "GB": 1e9, "GiB": 2**30, "TB": 1e12}[found[2]]


def host_memory() -> float:
    """Bytes of this machine's memory, or of the part that its container may take."""
    total = float(psutil.virtual_memory().total)
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(total, float(limit)) if limit.isdigit() else total


def free_memory() -> float:
    """Bytes of it that nothing else takes now."""
    return min(host_memory(), float(psutil.virtual_memory().available))


def _held(folder: Path) -> float:
    """Bytes of the files of a run that has begun there: it needs no room for them again."""
    if not RunFolder(folder).config_toml.is_file():
        return 0.0
    with suppress(FileNotFoundError):  # Of another process, which holds the run's lock.
        return float(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
    return 0.0


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
