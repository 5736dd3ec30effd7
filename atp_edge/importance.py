"""Where the decision starts: first-order (Taylor) importance of every structure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.budget import Space, project
from atp_edge.data import Blocks
from atp_edge.masked import lora_layer

# A KV group's score sums over head_dim inputs of o_proj alone, though the group owns rows of q, k
# and v too, which no other structure shares; measured in docs/log.md.
ATTENTION_FACTOR = 5.0
_READS = {"attention": "o_proj", "mlp": "down_proj"}


def taylor_importance(
    model: PeftModel, blocks: Blocks, space: Space, loss: Callable[[Blocks], Tensor]
) -> list[Tensor]:
    """Sum over tokens and inputs of |z * dL/dz|, z what o_proj or down_proj reads: [size] a site.

    The first-order change of the loss when a structure's output is zeroed, without cancellation
    over tokens (the activation form of LLM-Pruner's group Taylor score, arXiv 2305.11627, eq. 5).
    """
    scores = [torch.zeros(site.size, device=model.device) for site in space.sites]
    hooks = [
        lora_layer(model, site.layer, _READS[site.kind]).register_forward_pre_hook(
            partial(_watch, score)
        )
        for site, score in zip(space.sites, scores, strict=True)
    ]
    try:
        for i in range(len(blocks.input_ids)):
            loss(blocks.rows([i])).backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return [score.cpu() for score in scores]


def _watch(score: Tensor, module: Any, inputs: tuple[Tensor, ...]) -> None:
    z = inputs[0]

    def add(gradient: Tensor) -> None:
        taylor = (z.detach().float() * gradient.float()).abs().flatten(0, -2).sum(0)
        score.add_(taylor.view(len(score), -1).sum(1))

    z.register_hook(add)


def starting_logits(importance: list[Tensor], space: Space) -> list[Tensor]:
    """Log importance per parameter, shifted so that zero is the border of the first decision."""
    density = [
        torch.log(
            (score * (ATTENTION_FACTOR if site.kind == "attention" else 1.0)).clamp_min(1e-20)
            / site.unit_parameters
        )
        for score, site in zip(importance, space.sites, strict=True)
    ]
    thresholds = project(density, space).thresholds
    return [x - threshold for x, threshold in zip(density, thresholds, strict=True)]
