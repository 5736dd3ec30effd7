"""Where the decision starts: first-order (Taylor) importance of every structure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.budget import Space, project
from atp_edge.data import Blocks
from atp_edge.masked import set_decision

Loss = Callable[[Blocks], Tensor]


def taylor_importance(model: PeftModel, blocks: Blocks, space: Space, loss: Loss) -> list[Tensor]:
    """Mean over blocks of |dL/dm|, m the mask of a structure at 1: [size] a site.

    By the chain rule this is |sum of weight * gradient| over the structure's output weights, the
    group Taylor score of LLM-Pruner (arXiv 2305.11627, eq. 5). LoRA must be frozen by the caller.
    """
    masks = [torch.ones(s.size, requires_grad=True) for s in space.sites]
    on_device = [mask.to(model.device) for mask in masks]
    set_decision(model, on_device, "whole")
    total = [torch.zeros(s.size) for s in space.sites]
    for i in range(len(blocks.input_ids)):
        gradients = torch.autograd.grad(loss(blocks.rows([i])), masks)
        for score, gradient in zip(total, gradients, strict=True):
            score += gradient.abs()
        on_device = [mask.to(model.device) for mask in masks]
        set_decision(model, on_device, "whole")
    set_decision(model, None, "whole")
    return [score / len(blocks.input_ids) for score in total]


def starting_logits(importance: list[Tensor], space: Space) -> list[Tensor]:
    """Log importance per parameter, shifted so that zero is the border of the first decision."""
    density = [
        torch.log(score.clamp_min(1e-20) / site.unit_parameters)
        for score, site in zip(importance, space.sites, strict=True)
    ]
    thresholds = project(density, space).thresholds
    return [x - threshold for x, threshold in zip(density, thresholds, strict=True)]
