"""The type to compute in, as torch's own operators choose it."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_type(x: Tensor) -> torch.dtype:
    """Autocast's type where it is on for x's device, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
