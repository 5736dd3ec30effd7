"""Norms over all heads of a layer under a decision: their mean is that of the heads that stay.

A narrow model norms what it has. So that the masked one equals it, heads that the decision removes
do not count in the mean; what the norm makes of them is multiplied by zero later, as any mask does.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from atp_edge.model.families import HeadNorms, LayerShape
from atp_edge.model.structures import to_rows


def norm_kept(attention: Any, norms: HeadNorms, layer: LayerShape, mask: Tensor | None) -> None:
    """Put a decision on the norms of queries and keys; mask: [KV groups], or none.

    A mask that requires gradients brings them back.
    """
    for name, rows in ((norms.query, layer.rows("q")), (norms.key, layer.rows("k"))):
        norm = getattr(attention, name)
        norm.kept = None if mask is None else to_rows(mask, rows, "groups").float()
        norm.forward = MethodType(_over_kept, norm)


def _over_kept(norm: Any, x: Tensor) -> Tensor:
    """x [..., rows] over the root of the mean square of its kept rows, times the weight."""
    if norm.kept is None:
        computed: Tensor = type(norm).forward(norm, x)
        return computed
    wide = x.float()
    square = (wide.square() * norm.kept).sum(-1, keepdim=True) / norm.kept.sum()
    normed = wide * torch.rsqrt(square + norm.variance_epsilon)
    return (norm.weight * normed).to(x.dtype)
