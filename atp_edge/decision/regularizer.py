"""Group sparsity on the LoRA of removed structures (ATP, arXiv 2412.14426, section 3.4).

The group of a structure is its rows of lora_B in the projections it writes (q, k, v, or gate, up)
and its columns of lora_A in the projection that reads it (o, or down). Once a group is exactly
zero, cutting the structure off changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.masking.lora import lora_layer
from atp_edge.model.families import model_shape
from atp_edge.model.structures import Masks, SiteKind, by_structure, parts_by_structure


def _removed_groups(model: PeftModel, masks: Masks) -> Iterator[tuple[Tensor, Tensor]]:
    """A view [structures, ., .] of every LoRA factor of a site, and the structures removed."""
    shape = model_shape(model.get_base_model().config)
    for i in range(len(shape.layers)):
        for kind in get_args(SiteKind):
            mask = masks.of(i, kind)
            removed = (~mask.detach().bool()).nonzero().squeeze(1)
            if not len(removed):
                continue
            *writers, last = shape.projections(kind)
            for name in writers:
                writer = lora_layer(model, i, name)
                rows = writer.lora_B["default"].weight
                for part in parts_by_structure(rows, 0, writer.rows, len(mask), writer.space):
                    yield part, removed
            reader = lora_layer(model, i, last)
            columns = reader.lora_A["default"].weight
            yield by_structure(columns, 1, len(mask), reader.space), removed


def group_lasso(model: PeftModel, masks: Masks) -> Tensor:
    """Sum of the norms of all groups that the decision removes (a penalty on the loss)."""
    norms = [
        torch.linalg.vector_norm(groups[removed], dim=(1, 2)).sum()
        for groups, removed in _removed_groups(model, masks)
    ]
    return torch.stack(norms).sum() if norms else torch.zeros(())


@torch.no_grad()
def proximal_step(model: PeftModel, masks: Masks, threshold: float) -> None:
    """w <- w / |w| * max(|w| - threshold, 0) on every group that the decision removes, in place.

    threshold: strength times learning rate; a factor's share of a group is shrunk by itself.
    """
    for groups, removed in _removed_groups(model, masks):
        chosen = groups[removed]
        norms = torch.linalg.vector_norm(chosen, dim=(1, 2), keepdim=True)
        groups[removed] = chosen * (1 - threshold / norms.clamp_min(1e-30)).clamp_min(0)
