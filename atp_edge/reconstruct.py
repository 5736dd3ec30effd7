"""Closed-form repair of a decision: kept columns take over what removed ones did.

For o_proj and down_proj with input z (kept part S, removed part R) over calibration tokens, the
kept weights that come nearest to the whole output in the least-squares sense are
W_S + W_R C_RS (C_SS + damping)^-1, C = z^T z. It is folded into the base weights: no bias and no
new operator appears. Layers are repaired in order within one forward pass, each on the stream that
the repaired layers before it produce.

It belongs before the tuning. Weights that were tuned under the decision have taken over already,
and would do so twice: at the freeze of a joint loop that tunes the kept weights it raised the test
perplexity from about 22 to 143 (docs/log.md). When the decision moves, `Repair.move` takes the
old fold back and makes the new one: a structure that comes back adds only what the kept ones did
not do in its stead, and one that goes leaves behind what they can do for it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.data import Blocks
from atp_edge.families import READS, model_shape
from atp_edge.masked import MaskedLoraLinear, lora_layer, set_decision
from atp_edge.structures import to_rows

DAMPING = 1e-1


class Repair:
    """A repaired decision: masks (bool [size] a site) folded into the base weights in place.

    Keeps a Gram matrix [in, in] a site, in fp32, of what o_proj and down_proj read.
    """

    @torch.no_grad()
    def __init__(self, model: PeftModel, masks: list[Tensor], blocks: Blocks) -> None:
        layers = range(len(model_shape(model.get_base_model().config).layers))
        self.modules = [lora_layer(model, i, name) for i in layers for name in READS.values()]
        self.grams: list[Tensor] = []
        set_decision(model, masks, "whole", skip=False)
        hooks = [
            module.register_forward_pre_hook(partial(self._measure, site, mask))
            for site, (module, mask) in enumerate(zip(self.modules, masks, strict=True))
        ]
        ids = blocks.input_ids.to(model.device)
        try:
            # The decoder without its vocabulary projection: no logits are wanted.
            model.get_base_model().model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _measure(
        self, site: int, mask: Tensor, module: MaskedLoraLinear, inputs: tuple[Any, ...]
    ) -> None:
        z = inputs[0].flatten(0, -2).float()
        with torch.autocast(z.device.type, enabled=False):
            self.grams.append(z.T @ z)
            self._fold(site, mask)

    @torch.no_grad()
    def move(self, now: list[Tensor], to: list[Tensor]) -> None:
        """Repair for the decision `to` in place of `now`, for which it repairs so far."""
        for site, (before, after) in enumerate(zip(now, to, strict=True)):
            if not torch.equal(before, after):
                self._fold(site, before, sign=-1)
                self._fold(site, after)

    def _fold(self, site: int, mask: Tensor, sign: int = 1) -> None:
        module, gram = self.modules[site], self.grams[site]
        rows = to_rows(mask, module.in_features, module.space)
        kept, removed = rows.nonzero().squeeze(1), (~rows).nonzero().squeeze(1)
        if not len(removed):
            return
        within = gram[kept][:, kept]
        within.diagonal().add_(DAMPING * within.diagonal().mean())
        # [kept, removed]: how much of each removed input every kept one stands for.
        stands_for = torch.linalg.solve(within, gram[kept][:, removed])
        weight = module.get_base_layer().weight
        weight[:, kept] += sign * (weight[:, removed].float() @ stands_for.T).to(weight.dtype)
