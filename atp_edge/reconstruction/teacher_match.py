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

Where a norm or a factor stands between the projection and the stream (Gemma, OLMo 2, Granite), what
the projection should have put out is what the norm, at the size that it has now, makes the missing
part of.

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
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks
from atp_edge.masking.lora import MaskedLoraLinear, lora_layer
from atp_edge.model.families import READER_OF, ModelShape, model_shape
from atp_edge.model.hooks import into_layers, removed_after
from atp_edge.model.sharded import writes_stay
from atp_edge.reconstruction.least_squares import gram_of, solve_damped
from atp_edge.run import ranks
from atp_edge.run.watched import counted

# Of the gram's mean diagonal.
DAMPING = 0.3
# Of a norm: what passes through a smaller one reaches the stream hardly.
_NO_WEIGHT = 1e-2
# What is made of them in fp32 stays in a CPU's caches.
_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def match_teacher(model: PeftModel, teacher: PreTrainedModel, blocks: Blocks) -> None:
    """Move the base weights in place; what a decision on the model removes stays as it is.

    blocks: text [N, T], in one batch.
    """
    student = model.get_base_model()
    ids = ranks.shared(blocks.input_ids).to(student.device)
    shape = model_shape(student.config)
    ours, calls = into_layers(student, ids)
    theirs, their_calls = into_layers(teacher, ids)
    for i, layer in enumerate(counted(student.model.layers, "matching")):
        taught_by = teacher.model.layers[i]
        wanted: list[Tensor] = []
        with removed_after([_halfway(taught_by, shape, wanted.append)]):
            theirs = taught_by(theirs, **their_calls[i])
        wanted.append(theirs)
        entered = [ours]
        norms = shape.layout.norms
        adds = [_Adds(layer, name, shape) for name in (norms.after_attention, norms.after_mlp)]
        move = partial(_move, entered, wanted, adds)
        moved = [
            lora_layer(model, i, name).register_forward_hook(move) for name in READER_OF.values()
        ]
        reads = [lora_layer(model, i, name).get_base_layer() for name in READER_OF.values()]
        hooks = [_halfway(layer, shape, entered.append), *moved]
        with writes_stay(layer, reads), removed_after(hooks):
            ours = layer(ours, **calls[i])


class _Adds:
    """What a layer makes of a projection's output before it adds it to the stream."""

    def __init__(self, layer: Any, norm: str | None, shape: ModelShape) -> None:
        self.factor, self.eps = shape.scales.residual, shape.norm_eps
        self.weight: Tensor | None = None
        if norm is not None:
            self.weight = getattr(layer, norm).weight.float() + shape.layout.norm_offset

    def missing(self, output: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | float]:
        """What `output` [B, T, H] lacks so that `wanted` is added, and by how much of its size what
        is added changes with it [B, T, 1]."""
        if self.weight is None:
            return wanted / self.factor - output, self.factor
        size = (output.square().mean(-1, keepdim=True) + self.eps).sqrt()
        there = self.weight.abs() > _NO_WEIGHT
        scale = torch.where(there, self.weight, 1.0) * self.factor
        lacks = torch.where(there, wanted / scale * size - output, 0.0)
        return lacks, self.factor / size


def _move(
    entered: list[Tensor],
    wanted: list[Tensor],
    adds: list[_Adds],
    module: MaskedLoraLinear,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    """A hook on o_proj and then on down_proj: entered, the stream before each of them so far;
    wanted, the teacher's stream after both. Returns what the moved weights put out."""
    adds_here, mask = adds[len(entered) - 1], module.in_mask
    kept = slice(None) if mask is None else mask.nonzero().squeeze(1)
    z = inputs[0][..., kept]
    with torch.autocast(output.device.type, enabled=False):
        change = _least_squares(z, output, entered[-1], wanted[len(entered) - 1], adds_here)
        module.get_base_layer().weight[:, kept] += change.T
    return output + F.linear(z, change.T.to(z.dtype))


def _least_squares(
    z: Tensor, output: Tensor, stream: Tensor, target: Tensor, adds: _Adds
) -> Tensor:
    """What z [B, T, in] must be multiplied by, and added to a projection's output [B, T, H], so
    that the stream after it comes nearest to the target [B, T, H]: [in, H]."""
    gram = z.new_zeros(z.shape[-1], z.shape[-1], dtype=torch.float32)
    wanted = z.new_zeros(z.shape[-1], output.shape[-1], dtype=torch.float32)
    at_once = max(1, _TOKENS_AT_ONCE // z.shape[1])
    for parts in zip(*(x.split(at_once) for x in (z, output, stream, target)), strict=True):
        inputs, out, before, after = (x.float() for x in parts)
        missing, slope = adds.missing(out, after - before)
        size = (after / slope).norm(dim=-1, keepdim=True)
        inputs, missing = ((x / size).flatten(0, 1) for x in (inputs, missing))
        gram += gram_of(inputs)
        wanted.addmm_(inputs.T, missing)
    ranks.add_up([gram, wanted])
    return solve_damped(gram, wanted, DAMPING)


def _halfway(layer: Any, shape: ModelShape, read: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that hands on the stream between a layer's attention and its MLP."""
    reader: nn.Module = getattr(layer, shape.layout.norms.before_mlp or "mlp")
    return reader.register_forward_pre_hook(lambda _, inputs: read(inputs[0]))
