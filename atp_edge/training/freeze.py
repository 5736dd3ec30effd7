"""The freeze: the decision without noise, the model cut by it, both on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from atp_edge.data.blocks import Blocks
from atp_edge.masking.apply import set_decision
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import merge, narrow_peft
from atp_edge.model.plan import Plan, plan_of, shares, write_plan
from atp_edge.model.structures import Masks
from atp_edge.run import ranks
from atp_edge.training.adapters import add_recovery_adapter
from atp_edge.training.learners import JointLearner
from atp_edge.training.measure import loss_of
from atp_edge.training.narrow_state import save_narrow_peft
from atp_edge.training.setup import (
    TrainContext,
)
from atp_edge.training.teacher import match_layers


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """The last decision, and the narrow model that it makes."""

    plan: Plan
    narrow: PeftModel
    decoder_share: float
    whole_share: float
    masked_narrow_max_error: float


def cut_by_decision(learner: JointLearner, context: TrainContext) -> FrozenModel:
    """Take the decision without noise and cut the model by it."""
    context.progress.say("freezing the decision")
    model, masks = learner.model, learner.freeze()
    shape = model_shape(model.get_base_model().config)
    kept = [tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks]
    plan = plan_of(shape, kept, context.config.decision.space)
    narrow = narrow_peft(model, plan)
    share = shares(shape, model_shape(narrow.get_base_model().config))
    return FrozenModel(
        plan=plan,
        narrow=narrow,
        decoder_share=share.decoder,
        whole_share=share.whole,
        masked_narrow_max_error=masked_narrow_error(model, narrow, masks, context.splits.decision),
    )


def freeze(frozen: FrozenModel, context: TrainContext) -> dict[str, Any]:
    """Match the narrow model to the teacher, begin its adapter anew if asked for, and save both."""
    config, narrow = context.config, frozen.narrow
    match_layers(narrow, config.control_steps, context)
    if config.recovery.adapter != "lora":
        narrow = add_recovery_adapter(merge(narrow), config, frozen.plan)
    if ranks.is_main():
        save_narrow_peft(narrow, context.run, "frozen")
        write_plan(frozen.plan, context.run.plan)
    loss = loss_of(narrow, context.splits.test, context.accelerator)
    return {
        "perplexity": loss.perplexity,
        "masked_narrow_max_error": frozen.masked_narrow_max_error,
        "decoder_share": frozen.decoder_share,
        "whole_share": frozen.whole_share,
    }


@torch.no_grad()
def masked_narrow_error(model: PeftModel, narrow: PeftModel, masks: Masks, blocks: Blocks) -> float:
    """Largest difference of logits between the masked and the narrow model, fp32, one block.

    Masks of numbers really mask; a bool one would be computed as narrow as the narrow model.
    """
    batch = blocks.first(1).to(model.device)
    set_decision(model, Masks(mask.float() for mask in masks), "whole")
    difference = model(input_ids=batch.input_ids).logits - narrow(input_ids=batch.input_ids).logits
    return float(difference.abs().max())
