"""Closed-form repair of a decision: kept columns take over what removed ones did.

For o_proj and down_proj with input z (kept part S, removed part R) over calibration tokens, the
kept weights that come nearest to the whole output in the least-squares sense are
W_S + W_R C_RS (C_SS + damping)^-1, C = z^T z. It is folded into the base weights: no bias and no
new operator appears. Layers are repaired in order within one forward pass, each on the stream that
the repaired layers before it produce.

It belongs before the tuning. Weights that were tuned under the decision have taken over already,
and would do so twice: at the freeze of a joint loop that tunes the kept weights it raised the test
perplexity from about 22 to 143 (docs/research/log.md). When the decision moves, `Repair.move` takes
the old fold back and makes the new one: a structure that comes back adds only what the kept ones
did not do in its stead, and one that goes leaves behind what they can do for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.data.blocks import Blocks
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import MaskedLoraLinear, lora_layer
from atp_edge.model.families import READER_OF, model_shape
from atp_edge.model.hooks import read_under
from atp_edge.model.structures import Masks, to_rows
from atp_edge.reconstruction.least_squares import gram_of, solve_damped
from atp_edge.run import ranks
from atp_edge.run.watched import underway

DAMPING = 1e-1


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """How much of each removed input every kept one stands for: stands_for [kept, removed] of a
    site with this mask [size]; kept and removed: the inputs' places."""

    mask: Tensor
    kept: Tensor
    removed: Tensor
    stands_for: Tensor


def _solve(gram: Tensor, module: MaskedLoraLinear, mask: Tensor) -> _Fold:
    rows = to_rows(mask, module.in_features, module.space)
    kept, removed = rows.nonzero().squeeze(1), (~rows).nonzero().squeeze(1)
    of_kept = gram[kept]
    stands_for = of_kept[:, removed]
    if len(removed):  # Most attentions stay whole.
        stands_for = solve_damped(of_kept[:, kept], stands_for, DAMPING)
    return _Fold(mask=mask, kept=kept, removed=removed, stands_for=stands_for)


def _add(module: MaskedLoraLinear, fold: _Fold, sign: int) -> None:
    weight = module.get_base_layer().weight
    share = weight[:, fold.removed].float() @ fold.stands_for.T
    weight[:, fold.kept] += sign * share.to(weight.dtype)


class Repair:
    """A repaired decision: masks (bool [size] a site) folded into the base weights in place.

    Keeps a Gram matrix [in, in] a site, in fp32, of what o_proj and down_proj read, and the fold
    that it made (a quarter of that at most).
    """

    @torch.no_grad()
    def __init__(
        self, model: PeftModel, masks: Masks, blocks: Blocks, *, follows: bool = True
    ) -> None:
        """follows: off, it holds one site's matrices at a time and cannot `move`."""
        self.follows = follows
        layers = range(len(model_shape(model.get_base_model().config).layers))
        self.modules = [lora_layer(model, i, name) for i in layers for name in READER_OF.values()]
        self.grams: list[Tensor] = []
        self.folds: list[_Fold] = []
        set_decision(model, masks, "whole", skip=False)
        hooks = [
            module.register_forward_pre_hook(partial(self._measure, mask))
            for module, mask in zip(self.modules, masks, strict=True)
        ]
        with underway("repairing", len(hooks)) as one_more:
            hooks += [m.register_forward_hook(lambda *_: one_more()) for m in self.modules]
            read_under(hooks, model.get_base_model(), ranks.shared(blocks.input_ids))

    def _measure(self, mask: Tensor, module: MaskedLoraLinear, inputs: tuple[Any, ...]) -> None:
        z = inputs[0].flatten(0, -2).float()
        with torch.autocast(z.device.type, enabled=False):
            gram = gram_of(z)
            ranks.add_up([gram])
            fold = _solve(gram, module, mask)
            _add(module, fold, 1)
        if self.follows:
            self.grams.append(gram)
            self.folds.append(fold)

    @torch.no_grad()
    def move(self, masks: Masks) -> None:
        """Repair for another decision in place of the one so far."""
        for site, (module, mask) in enumerate(zip(self.modules, masks, strict=True)):
            if not torch.equal(self.folds[site].mask, mask):
                _add(module, self.folds[site], -1)
                self.folds[site] = _solve(self.grams[site], module, mask)
                _add(module, self.folds[site], 1)
