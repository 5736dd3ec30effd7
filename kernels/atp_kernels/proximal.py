"""The proximal step on the LoRA of all structures that a decision removes, in one launch.

Registered with torch.library: torch.compile keeps it whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.backend import fuses


def shrink_removed(groups: Sequence[Tensor], stays: Sequence[Tensor], threshold: float) -> None:
    """As `reference.proximal_step`: groups [size, ., .] of LoRA factors, in place, and which of
    their structures stay."""
    proximal_step(list(groups), list(stays), threshold)
    # A kernel's writing is not seen by torch, and what is made of a factor falls with its version.
    torch.autograd.graph.increment_version(groups)


@torch.library.custom_op(
    "atp::proximal_step",
    mutates_args=("groups",),
    schema="(Tensor(a!)[] groups, Tensor[] stays, float threshold) -> ()",
)
def proximal_step(groups: list[Tensor], stays: list[Tensor], threshold: float) -> None:
    """As `reference.proximal_step`."""
    if fuses(groups[0]) and all(group.dtype == torch.float32 for group in groups):
        from atp_kernels import proximal_triton

        proximal_triton.proximal_step(groups, stays, threshold)
        return
    reference.proximal_step(groups, stays, threshold)


@proximal_step.register_fake
def _(groups: list[Tensor], stays: list[Tensor], threshold: float) -> None:
    return None
