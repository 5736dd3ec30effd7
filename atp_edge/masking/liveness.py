"""Which structures of a site under a fixed decision can reach the output at all.

A removed one is dead when nothing of it can reach the output and no gradient can reach its LoRA:

- placement `whole`: always.
- placement `base`, MLP: its rows of B are zero in gate and up. Then silu(g) u is zero, and so are
  the gradients of those rows (d_gate carries the factor u, d_up the factor silu(g)) and of its
  column of A in down (the factor silu(g) u).
- placement `base`, attention: its rows of B in v and its columns of A in o are zero. Then neither
  values nor output nor their gradients exist; q and k have nothing to weigh.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from atp_edge.masking.lora import MaskedLoraLinear, Placement


def deciding_factors(
    placement: Placement, projections: Mapping[str, MaskedLoraLinear]
) -> list[tuple[Tensor, int]]:
    """(factor, its dimension of structures): a removed structure is dead when its share of every
    one of them is zero."""
    if placement == "whole":
        return []
    factors = {name: (p.lora_A["default"].weight, p.lora_B["default"].weight)
               for name, p in projections.items()}  # fmt: skip
    if "o_proj" in factors:
        return [(factors["v_proj"][1], 0), (factors["o_proj"][0], 1)]
    return [(factors["gate_proj"][1], 0), (factors["up_proj"][1], 0)]


@torch.no_grad()
def alive(
    mask: Tensor, placement: Placement, projections: Mapping[str, MaskedLoraLinear]
) -> Tensor:
    """bool [size], on the device: kept, or removed and not dead. mask: bool [size]."""
    found = mask
    for factor, dim in deciding_factors(placement, projections):
        share = factor.unflatten(dim, (len(mask), -1)).movedim(dim, 0).flatten(1)
        found = found | share.ne(0).any(1)
    return found
