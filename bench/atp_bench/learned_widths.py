"""Kept widths as a run learned them: what random scores keep is alike in every layer, and a learned
plan is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atp_edge.model.structures import Masks, Site

SHARE = 0.6
"""Of the decoder's parameters."""
CHANNELS = (
    1536, 1536, 1504, 1408, 1184, 1088, 992, 960, 1024, 1120, 1056, 768, 576, 384, 320,
    288, 256, 320, 352, 384, 512, 416, 512, 448, 512, 416, 384, 352, 352, 512,
)  # fmt: skip
"""By layer, of SmolLM2-135M: examples/demo.toml at 12 steps. Every attention is kept whole."""
_SIZES = (3, 1536)


def learned_masks(sites: Sequence[Site], kept: float) -> Masks | None:
    """A decision of these widths, of random structures; None for another model or share."""
    alike = [site.size for site in sites] == list(_SIZES) * len(CHANNELS)
    if not alike or kept != SHARE:
        return None
    draw = torch.Generator().manual_seed(0)
    found = []
    for site in sites:
        width = CHANNELS[site.layer] if site.kind == "mlp" else site.size
        mask = torch.zeros(site.size, dtype=torch.bool)
        mask[torch.randperm(site.size, generator=draw)[:width]] = True
        found.append(mask)
    return Masks(found)
