"""Distillation of the teacher's layers in closed form, from one pass over text.

Site by site, the weights of o_proj and down_proj move to where the stream after the site comes
nearest to the teacher's, every token over the teacher's own size there: with inputs z of a token,
what its stream still lacks r, and the teacher's stream s,

    change = argmin sum |r - change z|^2 / |s|^2 + damping |change|^2.

This is the distance that a step lessens as well (`atp_edge.losses`), brought to its least over all
tokens at once. Sites are moved in order, so that each makes good what those before it could not,
and takes what the teacher learned as far as a linear map of its inputs can. Both models go through
the text side by side, a layer at a time: of either no more is held than its stream and one layer's
activations.

Damping pulls towards the weights as they are: a model that has come as near as the text tells stays
where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks
from atp_edge.masking.lora import MaskedLoraLinear, lora_layer
from atp_edge.model.families import READER_OF
from atp_edge.model.hooks import into_layers, removed_after
from atp_edge.reconstruction.repair import solve_damped
from atp_edge.run import ranks
from atp_edge.run.watched import counted

# Of the gram's mean diagonal.
DAMPING = 0.3


@torch.no_grad()
def match_teacher(model: PeftModel, teacher: PreTrainedModel, blocks: Blocks) -> None:
    """Move the base weights in place; what a decision on the model removes stays as it is.

    blocks: text [N, T], in one batch.
    """
    student, ids = model.get_base_model(), ranks.shared(blocks.input_ids)
    ours, calls = into_layers(student, ids)
    theirs, their_calls = into_layers(teacher, ids)
    for i, layer in enumerate(counted(student.model.layers, "matching")):
        taught_by = teacher.model.layers[i]
        wanted: list[Tensor] = []
        with removed_after([_halfway(taught_by, wanted.append)]):
            theirs = taught_by(theirs, **their_calls[i])
        wanted.append(theirs)
        entered = [ours]
        move = partial(_move, entered, wanted)
        moved = [
            lora_layer(model, i, name).register_forward_hook(move) for name in READER_OF.values()
        ]
        with removed_after([_halfway(layer, entered.append), *moved]):
            ours = layer(ours, **calls[i])


def _move(
    entered: list[Tensor],
    wanted: list[Tensor],
    module: MaskedLoraLinear,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    """A hook on o_proj and then on down_proj: entered, the stream before each of them so far;
    wanted, the teacher's stream after both. Returns what the moved weights put out."""
    stream, target = entered[-1], wanted[len(entered) - 1].float()
    with torch.autocast(output.device.type, enabled=False):
        z, mask = inputs[0].float(), module.in_mask
        kept = slice(None) if mask is None else mask.nonzero().squeeze(1)
        z = z[..., kept]
        change = _least_squares(z, target - stream - output, target)
        module.get_base_layer().weight[:, kept] += change.T
        return output + z @ change


def _least_squares(z: Tensor, missing: Tensor, target: Tensor) -> Tensor:
    """What z [B, T, in] must be multiplied by to come nearest to `missing` [B, T, H]: [in, H]."""
    z, missing, target = (x.flatten(0, 1) for x in (z, missing, target))
    weighted = z / target.square().sum(-1, keepdim=True)
    gram, wanted = weighted.T @ z, weighted.T @ missing
    ranks.add_up([gram, wanted])
    return solve_damped(gram, wanted, DAMPING)


def _halfway(layer: Any, read: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that hands on the stream between a layer's attention and its MLP."""
    norm: nn.Module = layer.post_attention_layernorm
    return norm.register_forward_pre_hook(lambda _, inputs: read(inputs[0]))
