"""The dense tuned model as a teacher: of the steps, and of the layers in closed form."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from atp_edge.data.blocks import drawn
from atp_edge.model.checkpoint import load_narrow
from atp_edge.reconstruction.teacher_match import match_teacher
from atp_edge.training.cpu import giving_back_freed_memory
from atp_edge.training.setup import (
    AUTOCAST,
    TrainContext,
    placed,
)


def teacher_of(context: TrainContext) -> PreTrainedModel | None:
    """The dense tuned model, if the run distils from it."""
    if not context.config.recovery.distill:
        return None
    dense = placed(load_narrow(context.run.dense), context.accelerator)
    return frozen_for(context.config.train.precision, dense)


def frozen_for(precision: str, model: PreTrainedModel) -> PreTrainedModel:
    """A model that no step changes, its projections kept in the type that autocast gives them:
    half the memory, the same outputs, and nothing cast at every step."""
    head = model.get_output_embeddings()  # may be the embeddings, whose outputs are fp32
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and precision in AUTOCAST:
            module.to(AUTOCAST[precision])
    return model.requires_grad_(False)


def match_layers(model: PeftModel, step: int, context: TrainContext) -> None:
    """Move the layers towards the dense tuned model's, in closed form.

    Reads the blocks that the steps from this one on will read, and no others.
    """
    config, train, accelerator = context.config, context.splits.train, context.accelerator
    first = step * config.train.batch_blocks
    left = min(config.train_blocks - first, len(train.input_ids))
    count = min(config.recovery.approach_blocks, left)
    if count:
        context.progress.say("matching the layers to the dense tuned model's in closed form")
        dense = placed(load_narrow(context.run.dense), accelerator)
        with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
            match_teacher(model, dense, drawn(train, first, count, seed=config.seed))
