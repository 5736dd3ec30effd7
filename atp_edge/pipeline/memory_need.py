"""What a part of a run takes, and of what model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from atp_edge.model.families import ModelShape

DeviceKind = Literal["cpu", "cuda"]
Bytes = Mapping[str, float]
CPU_RUNTIME = 0.8e9
"""Of torch, transformers and the text (measured)."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A run's model: dense and about as it will be cut, and how it lies on the disk.

    stored: bytes a weight of its checkpoint. dense_onnx, slim_onnx: bytes of the exported folders.
    """

    dense: ModelShape
    slim: ModelShape
    stored: torch.dtype
    dense_onnx: int
    slim_onnx: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a part of a run takes at its peak: on the device, in host memory, on the disk.

    On a CPU the device is the host, and `host` is empty. disk: what the part leaves or needs there.
    least: what is enough, of a part that takes less where there is less (0: it does not). can_wait:
    it may be done later, on another machine, and nothing else of the run waits for it. instead: how
    it is done where this does not fit.
    """

    part: str
    device: Bytes
    host: Bytes = field(default_factory=dict)
    disk: Bytes = field(default_factory=dict)
    least: float = 0.0
    can_wait: bool = False
    instead: Need | None = None

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> float:
        return sum(self.disk.values())

    def to_dict(self) -> dict[str, Any]:
        """For machines: bytes, and of what."""
        return {"part": self.part, "device": self.device, "host": self.host, "disk": self.disk}


def peak(held: Bytes, *at: Bytes) -> Bytes:
    """What is held throughout, and at the moment that takes most beside it."""
    most = max(at, key=_total)
    found = {**held, **most}
    return {name: size for name, size in found.items() if size}


def _total(taken: Bytes) -> float:
    return sum(taken.values())
