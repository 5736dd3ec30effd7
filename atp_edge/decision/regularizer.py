"""Group sparsity on the LoRA of removed structures (ATP, arXiv 2412.14426, section 3.4).

The group of a structure is its rows of lora_B in the projections it writes (q, k, v, or gate, up)
and its columns of lora_A in the projection that reads it (o, or down). Once a group is exactly
zero, cutting the structure off changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from atp_kernels import shrink_removed
from peft import PeftModel
from torch import Tensor

from atp_edge.masking.lora import lora_layer
from atp_edge.model.families import model_shape
from atp_edge.model.structures import Masks, SiteKind, by_structure, parts_by_structure


def structure_groups(model: PeftModel, masks: Masks) -> Iterator[tuple[Tensor, Tensor]]:
    """A view [structures, ., .] of every LoRA factor of a site, and which structures stay: bool."""
    shape = model_shape(model.get_base_model().config)
    for i in range(len(shape.layers)):
        for kind in get_args(SiteKind):
            mask = masks.of(i, kind)
            stays = mask if mask.dtype == torch.bool else mask.detach().bool()
            *writers, last = shape.projections(kind)
            for name in writers:
                writer = lora_layer(model, i, name)
                rows = writer.lora_B["default"].weight
                for part in parts_by_structure(rows, 0, writer.rows, len(mask), writer.space):
                    yield part, stays
            reader = lora_layer(model, i, last)
            columns = reader.lora_A["default"].weight
            yield by_structure(columns, 1, len(mask), reader.space), stays


def group_lasso(model: PeftModel, masks: Masks) -> Tensor:
    """Sum of the norms of all groups that the decision removes (a penalty on the loss)."""
    norms = [
        torch.linalg.vector_norm(groups, dim=(1, 2)).masked_fill(stays, 0).sum()
        for groups, stays in structure_groups(model, masks)
    ]
    return torch.stack(norms).sum()


@torch.no_grad()
def proximal_step(model: PeftModel, masks: Masks, threshold: float) -> None:
    """w <- w / |w| * max(|w| - threshold, 0) on every group that the decision removes, in place.

    threshold: strength times learning rate; a factor's share of a group is shrunk by itself.
    Nothing is read back to the host.
    """
    groups, stays = zip(*structure_groups(model, masks), strict=True)
    shrink_removed(groups, stays, threshold)
