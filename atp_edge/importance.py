"""First-order (Taylor) importance of every structure: where the decision starts, and, measured
along the way on the masked and tuned model, what it follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.budget import Space, project
from atp_edge.data import Blocks
from atp_edge.families import READS, module_path

# A KV group's score sums over head_dim inputs of o_proj alone, though the group owns rows of q, k
# and v too, which no other structure shares; measured in docs/log.md.
ATTENTION_FACTOR = 5.0


def taylor_importance(
    model: PreTrainedModel, blocks: Blocks, space: Space, loss: Callable[[Blocks], Tensor]
) -> list[Tensor]:
    """Importance a block of every structure, mean over blocks: [size] a site."""
    # Gradients of what the layers read are wanted, whether or not any weight has one.
    model.enable_input_require_grads()
    with scored(model, space) as scores:
        for i in range(len(blocks.input_ids)):
            loss(blocks.rows([i]).to(model.device)).backward()
    model.disable_input_require_grads()
    model.zero_grad()
    return [score.cpu() / len(blocks.input_ids) for score in scores]


@contextmanager
def scored(model: nn.Module, space: Space) -> Iterator[list[Tensor]]:
    """Sums of |z * dL/dz| over tokens and inputs, of all backward passes inside: [size] a site.

    z is what o_proj or down_proj reads, before any mask; its gradient is that of the whole weight,
    so that removed structures are scored like kept ones. The first-order change of the loss when
    an output appears or goes, without cancellation over tokens (the activation form of
    LLM-Pruner's group Taylor score, arXiv 2305.11627, eq. 5).
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    scores = [torch.zeros(site.size, device=base.device) for site in space.sites]
    hooks = [
        base.get_submodule(module_path(site.layer, READS[site.kind])).register_forward_hook(
            partial(_watch, score)
        )
        for site, score in zip(space.sites, scores, strict=True)
    ]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


def _watch(score: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    z = inputs[0].detach()

    def add(gradient: Tensor) -> None:
        with torch.no_grad():
            taylor = (z.float() * _input_gradient(module, gradient).float()).abs()
            score.add_(taylor.flatten(0, -2).sum(0).view(len(score), -1).sum(1))

    output.register_hook(add)


def _input_gradient(module: Any, gradient: Tensor) -> Tensor:
    """dL/dz [..., in] of (W + s B A) z from dL/dy [..., out]; of W z where there is no LoRA."""
    kind = gradient.dtype
    if not isinstance(module, LoraLayer):
        return gradient @ module.weight.to(kind)
    base = module.get_base_layer().weight.to(kind)
    a, b = (f["default"].weight.to(kind) for f in (module.lora_A, module.lora_B))
    return gradient @ base + module.scaling["default"] * ((gradient @ b) @ a)


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
