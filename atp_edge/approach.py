"""Distillation of the teacher's layers in closed form, from one pass over text.

Site by site, the weights of o_proj and down_proj move to where the stream after the site comes
nearest to the teacher's, every token over the teacher's own size there: with inputs z of a token,
what its stream still lacks r, and the teacher's stream s,

    change = argmin sum |r - change z|^2 / |s|^2 + damping |change|^2.

This is the distance that a step lessens as well (`atp_edge.losses`), brought to its least over all
tokens at once. Sites are moved in order within one forward pass, so that each makes good what those
before it could not, and takes what the teacher learned as far as a linear map of its inputs can.
Damping pulls towards the weights as they are: a model that has come as near as the text tells stays
where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from atp_edge.data import Blocks
from atp_edge.families import READS
from atp_edge.lora import MaskedLoraLinear, lora_layer
from atp_edge.reconstruct import solve_damped
from atp_edge.watched import read_under

# Of the gram's mean diagonal.
DAMPING = 0.3


@torch.no_grad()
def approach(model: PeftModel, teacher: PreTrainedModel, blocks: Blocks) -> None:
    """Move the base weights in place; what a decision on the model removes stays as it is.

    blocks: text [N, T], in one batch. The teacher's stream is held at every site, in bf16 on the
    CPU: 2.3 GB for 64 blocks of 512 tokens and 30 layers of 576.
    """
    ids = blocks.input_ids
    wanted: list[Tensor] = []
    hooks = _on_stream(teacher, lambda x: wanted.append(x.to("cpu", torch.bfloat16)))
    read_under(hooks, teacher, ids)
    student = model.get_base_model()
    entered: list[Tensor] = []
    sites = iter(wanted[1:])

    def move(module: MaskedLoraLinear, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        target = next(sites).to(output.device, torch.float32)
        with torch.autocast(output.device.type, enabled=False):
            z, mask = inputs[0].float(), module.in_mask
            kept = slice(None) if mask is None else mask.nonzero().squeeze(1)
            z = z[..., kept]
            change = _least_squares(z, target - entered.pop() - output, target)
            module.get_base_layer().weight[:, kept] += change.T
            return output + z @ change

    hooks = _on_stream(student, entered.append)
    for layer in range(len(student.model.layers)):
        hooks += [lora_layer(model, layer, n).register_forward_hook(move) for n in READS.values()]
    read_under(hooks, student, ids)


def _least_squares(z: Tensor, missing: Tensor, target: Tensor) -> Tensor:
    """What z [B, T, in] must be multiplied by to come nearest to `missing` [B, T, H]: [in, H]."""
    z, missing, target = (x.flatten(0, 1) for x in (z, missing, target))
    heeded = z / target.square().sum(-1, keepdim=True)
    return solve_damped(heeded.T @ z, heeded.T @ missing, DAMPING)


def _on_stream(model: PreTrainedModel, read: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Hooks that hand on the stream [B, T, H] before every site, and after the last one."""
    decoder: Any = model.model
    norms = [n for x in decoder.layers for n in (x.input_layernorm, x.post_attention_layernorm)]
    return [
        norm.register_forward_pre_hook(lambda _, inputs: read(inputs[0]))
        for norm in (*norms, decoder.norm)
    ]
