"""Closed-form repair of a decision: kept columns take over what removed ones did.

For o_proj and down_proj with input z (kept part S, removed part R) over calibration tokens, the
kept weights that come nearest to the whole output in the least-squares sense are
W_S + W_R C_RS (C_SS + damping)^-1, C = z^T z. It is folded into the base weights: no bias and no
new operator appears. Layers are repaired in order within one forward pass, each on the stream that
the repaired layers before it produce.

It belongs before the tuning. Weights that were tuned under the decision have taken over already,
and would do so twice: at the freeze of a joint loop that tunes the kept weights it raised the test
perplexity from about 22 to 143 (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.data import Blocks
from atp_edge.families import model_shape
from atp_edge.masked import MaskedLoraLinear, lora_layer, set_decision

DAMPING = 1e-1


@torch.no_grad()
def reconstruct(model: PeftModel, masks: list[Tensor], blocks: Blocks) -> None:
    """Repair the base weights of o_proj and down_proj in place for fixed masks (bool a site)."""
    set_decision(model, masks, "whole", skip=False)
    layers = range(len(model_shape(model.get_base_model().config).layers))
    modules = [lora_layer(model, i, p) for i in layers for p in ("o_proj", "down_proj")]
    hooks = [module.register_forward_pre_hook(_repair) for module in modules]
    try:
        # The decoder without its vocabulary projection: no logits are wanted.
        model.get_base_model().model(input_ids=blocks.input_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _repair(module: MaskedLoraLinear, inputs: tuple[Any, ...]) -> None:
    mask = module.in_mask
    assert mask is not None
    kept, removed = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
    if not len(removed):
        return
    z = inputs[0].flatten(0, -2).float()
    z_kept, z_removed = z[:, kept], z[:, removed]
    within = z_kept.T @ z_kept
    within.diagonal().add_(DAMPING * within.diagonal().mean())
    # [kept, removed]: how much of each removed input every kept one stands for.
    stands_for = torch.linalg.solve(within, z_kept.T @ z_removed)
    weight = module.get_base_layer().weight
    whole = weight.float() + module.get_delta_weight("default").float()
    weight[:, kept] += (whole[:, removed] @ stands_for.T).to(weight.dtype)
