"""The dense tuned model as a teacher: of the steps, and of the layers in closed form."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from atp_edge.config import Config
from atp_edge.data.blocks import drawn
from atp_edge.model.families import READER_OF
from atp_edge.model.narrow import build_model
from atp_edge.model.sharded import is_sharded
from atp_edge.model.stream import fill, put, without_weights
from atp_edge.reconstruction.teacher_match import match_teacher
from atp_edge.run.folder import RunFolder
from atp_edge.run.freed_memory import giving_back_freed_memory
from atp_edge.run.records import DENSE_ADAPTER
from atp_edge.training.adapters import with_lora
from atp_edge.training.frozen import frozen_kind, load_frozen, shards
from atp_edge.training.optimizer import lora_parameters
from atp_edge.training.setup import TrainContext, with_attention


def teacher_of(context: TrainContext) -> PreTrainedModel | None:
    """The dense tuned model, if the run distils from it."""
    return dense_tuned(context) if context.config.recovery.distill else None


def dense_tuned(context: TrainContext) -> PreTrainedModel:
    """The dense tuned model on the device, frozen."""
    device, kind = context.accelerator.device, frozen_kind(context.config)
    made = load_frozen(context.run.dense, kind, device, shared=shards(context.config))
    return with_attention(made, device)


def teacher_beside(dense: PreTrainedModel, context: TrainContext) -> nn.Module | None:
    """The same, where LoRA alone is tuned: on the weights of `dense` (`teacher_on`)."""
    config, adapter = context.config, dense_adapter_file(context.run)
    shares = not config.recovery.retrain and config.decision.space == "groups"
    # Weights that are shared out over ranks belong to one module: the teacher has its own there.
    shares = shares and not is_sharded(dense)
    if not config.recovery.distill or not shares or not adapter.exists():
        return teacher_of(context)
    return teacher_on(dense, adapter, config, context.accelerator.device)


def teacher_on(
    dense: PreTrainedModel, adapter: Path, config: Config, device: torch.device
) -> nn.Module:
    """A teacher on the weights of `dense`, with an adapter of its own, read from its file.

    dense: as it came. What moves of it later, o_proj and down_proj, it has anew after this call.
    """
    own = dict(dense.named_parameters())
    with without_weights():
        twin = build_model(dense.config, torch.float32)
    for path, module in dense.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:  # bitsandbytes'
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, copy.copy(module))
    twin.tie_weights()
    fill(twin, [n for n, p in twin.named_parameters() if p.is_meta], lambda n: own[n].data)
    twin.tie_weights()
    taught = with_lora(config, with_attention(twin.to(device).eval(), device))
    held = load_file(adapter, device=str(device))
    for name, parameter in lora_parameters(taught).items():
        parameter.data = held[name]
    for path, module in dense.named_modules():
        if path.rpartition(".")[2] in READER_OF.values():
            put(module, "weight", module.weight.detach().clone())
    return taught.requires_grad_(False)


def dense_adapter_file(run: RunFolder) -> Path:
    """The LoRA of the dense baseline, by the names of its parameters."""
    return run.path / DENSE_ADAPTER


def match_layers(
    model: PeftModel, step: int, context: TrainContext, teacher: nn.Module | None = None
) -> None:
    """Move the layers towards the dense tuned model's, in closed form.

    Reads the blocks that the steps from this one on will read, and no others. teacher: that of the
    steps; where it is the dense tuned model itself, it is not read again.
    """
    config, train, accelerator = context.config, context.splits.train, context.accelerator
    first = step * config.train.batch_blocks
    left = min(config.train_blocks - first, len(train.input_ids))
    count = min(config.recovery.approach_blocks, left)
    if count:
        context.progress.say("matching the layers to the dense tuned model's in closed form")
        own = isinstance(teacher, PreTrainedModel)
        dense = cast(PreTrainedModel, teacher) if own else dense_tuned(context)
        with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
            match_teacher(model, dense, drawn(train, first, count, seed=config.seed))
