"""The freeze: the decision without noise, the model cut by it, both on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.masking.apply import set_decision
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import merge, narrow_peft
from atp_edge.model.plan import Plan, plan_of, shares, write_plan
from atp_edge.model.structures import Masks
from atp_edge.run import ranks
from atp_edge.training.adapters import add_recovery_adapter
from atp_edge.training.frozen import in_fp32
from atp_edge.training.measure import loss_of
from atp_edge.training.narrow_state import save_narrow_peft
from atp_edge.training.setup import TrainContext
from atp_edge.training.teacher import match_layers


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """The last decision, and the narrow model that it makes."""

    plan: Plan
    narrow: PeftModel
    decoder_share: float
    whole_share: float
    masked_narrow_max_error: float


def cut_by_decision(model: PeftModel, masks: Masks, context: TrainContext) -> FrozenModel:
    """The model cut by a decision; the dense one is taken apart, and of no use after it."""
    shape = model_shape(model.get_base_model().config)
    plan = plan_of(shape, masks.kept(), context.config.decision.space)
    block = context.splits.decision.first(1).input_ids
    masked = masked_logits(model, masks, block)
    narrow = narrow_peft(model, plan, take=True)
    share = shares(shape, model_shape(narrow.get_base_model().config))
    return FrozenModel(
        plan=plan,
        narrow=narrow,
        decoder_share=share.decoder,
        whole_share=share.whole,
        masked_narrow_max_error=_largest_difference(masked, plain_logits(narrow, block)),
    )


def freeze(frozen: FrozenModel, context: TrainContext) -> dict[str, Any]:
    """Match the narrow model to the teacher, begin its adapter anew if asked for, and save both."""
    config, narrow = context.config, frozen.narrow
    match_layers(narrow, config.control_steps, context)
    if config.recovery.adapter != "lora":
        narrow = add_recovery_adapter(merge(narrow, take=True), config, frozen.plan)
    save_narrow_peft(narrow, context.run, "frozen")
    if ranks.is_main():
        write_plan(frozen.plan, context.run.plan)
    loss = loss_of(narrow, context.splits.test, context.accelerator)
    return {
        "perplexity": loss.perplexity,
        "masked_narrow_max_error": frozen.masked_narrow_max_error,
        "decoder_share": frozen.decoder_share,
        "whole_share": frozen.whole_share,
    }


@torch.no_grad()
def masked_logits(model: PeftModel, masks: Masks, ids: Tensor) -> Tensor:
    """Logits of the masked model in fp32, on one block [1, T].

    Masks of numbers really mask; a bool one would be computed as narrow as the narrow model.
    """
    set_decision(model, Masks(mask.float() for mask in masks), "whole")
    return plain_logits(model, ids)


@torch.no_grad()
def plain_logits(model: PeftModel, ids: Tensor) -> Tensor:
    """Logits of a model in fp32, on one block [1, T]."""
    with in_fp32(model):
        logits: Tensor = model(input_ids=ids.to(model.device)).logits
    return logits


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
