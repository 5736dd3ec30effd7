"""What a step learns from: the next token, and the dense tuned teacher.

The vocabulary projection and its loss go through chunks of labelled tokens. A chunk's gradient is
taken at once, so that neither forward nor backward holds more logits than one chunk's: the memory
of the loss no longer grows with the batch (the idea of Liger's fused linear cross-entropy,
arXiv 2410.10989, section 3.2; its kernels need a GPU).

Shapes: B batch, T tokens of a block, L labelled tokens, H hidden, V vocabulary, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from atp_edge.data.blocks import Blocks
from atp_edge.model.attention import whole_blocks
from atp_edge.model.families import Scales, scales_of

# Forward and backward of 2048 tokens at H = 576, V = 49152 (2 cores of an EPYC, least of 4, bf16 /
# fp32): 1.90 / 3.63 s in chunks of 256, 1.70 / 2.99 s of 512, 1.50 / 2.74 s all at once. A chunk of
# 512 is 96 MiB of fp32 logits there. Not measured yet on a GPU.
CHUNK_TOKENS = 512

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits [C, V] in fp32, which of the L tokens, whether it is to be differentiated) -> (sum of the
losses, d sum / d logits or None).

May overwrite the logits and return them as their gradient.
"""


def language_loss(model: nn.Module, batch: Blocks) -> Tensor:
    """Mean next-token cross-entropy over the labelled tokens of a batch ([B, T]).

    Raises ValueError where no token is labelled.
    """
    (hidden,), targets = _labelled_hidden(model, batch)
    _check_labelled(targets)
    head = _causal(model).get_output_embeddings()
    return mean_cross_entropy(hidden, head, targets, _scales(model))


@torch.no_grad()
def token_losses(model: nn.Module, batch: Blocks) -> Tensor:
    """Negative log-likelihood of every labelled token of a batch ([B, T]): [L], fp32."""
    (hidden,), targets = _labelled_hidden(model, batch)
    head, scales = _causal(model).get_output_embeddings(), _scales(model)
    pairs = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    losses = [
        F.cross_entropy(scaled(head(h).float(), scales), t, reduction="none") for h, t in pairs
    ]
    return torch.cat(losses)


def distilled_loss(
    model: nn.Module, teacher: nn.Module, batch: Blocks, weight: float, hidden_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(cross-entropy against a mix of next token and teacher, that against the next token alone).

    weight: the teacher's share of the mix; the gradient is that of (1 - weight) * cross-entropy +
    weight * KL(teacher | model). The teacher's whole distribution counts: its likeliest tokens
    alone, renormalized, would teach that no other token ever comes.
    hidden_weight: of the distance between the layers' outputs (`_layers_distance`), added.
    """
    layers, targets = _labelled_hidden(model, batch, every_layer=hidden_weight > 0)
    _check_labelled(targets)
    with torch.no_grad():
        wanted_layers, _ = _labelled_hidden(teacher, batch, every_layer=hidden_weight > 0)
        teacher_head = _causal(teacher).get_output_embeddings()
        wanted, teacher_weight = _autocast(wanted_layers[-1], teacher_head.weight)
    hidden, scales, teacher_scales = layers[-1], _scales(model), _scales(teacher)
    plain = hidden.new_zeros((), dtype=torch.float32)

    def chunk(logits: Tensor, tokens: slice, differentiated: bool) -> tuple[Tensor, Tensor | None]:
        chosen = targets[tokens, None]
        taught = F.linear(wanted[tokens], teacher_weight).float()
        taught = scaled(taught, teacher_scales).softmax(-1)
        normalizers = logits.logsumexp(-1, keepdim=True)
        of_token = (normalizers - logits.gather(-1, chosen)).sum()
        plain.add_(of_token)
        # A dot: the product of the two as a tensor would be one more pass over memory.
        of_teacher = normalizers.sum() - torch.dot(taught.flatten(), logits.flatten())
        total = (1 - weight) * of_token + weight * of_teacher
        if not differentiated:
            return total, None
        gradient = logits.sub_(normalizers).exp_().sub_(taught, alpha=weight)
        gradient.scatter_add_(-1, chosen, torch.full_like(normalizers, weight - 1))
        return total, gradient

    head = _causal(model).get_output_embeddings()
    total = _projected(hidden, head, chunk, scales) / len(targets)
    if hidden_weight:
        total = total + hidden_weight * _layers_distance(layers, wanted_layers)
    return total, plain / len(targets)


def _layers_distance(layers: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Squared distance of every layer's output [L, H] to the teacher's, token by token over the
    teacher's own size; the mean over tokens and layers.

    By token, for decoders park attention on a token whose output is a hundred times the others'
    (massive activations, arXiv 2402.17762): over the size of all, that token alone would count.
    """

    def size(of: Tensor) -> Tensor:
        return of.float().square().sum(-1)

    pairs = zip(layers, wanted, strict=True)
    distances = [(size(x.float() - y) / size(y)).mean() for x, y in pairs]
    return torch.stack(distances).mean()


def mean_cross_entropy(
    hidden: Tensor, head: nn.Linear, targets: Tensor, scales: Scales | None = None
) -> Tensor:
    """Mean cross-entropy of hidden [L, H] projected by `head`, and scaled and capped, against
    targets [L]."""

    def chunk(logits: Tensor, tokens: slice, differentiated: bool) -> tuple[Tensor, Tensor | None]:
        chosen = targets[tokens, None]
        normalizers = logits.logsumexp(-1, keepdim=True)
        total = (normalizers - logits.gather(-1, chosen)).sum()
        if not differentiated:
            return total, None
        gradient = logits.sub_(normalizers).exp_()
        return total, gradient.scatter_add_(-1, chosen, -torch.ones_like(normalizers))

    return _projected(hidden, head, chunk, scales or Scales()) / len(targets)


@torch.no_grad()
def sum_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, scales: Scales) -> float:
    """Cross-entropy of hidden [L, H] projected by head [V, H], and scaled and capped, against
    targets [L], summed."""
    pairs = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    return sum(
        float(F.cross_entropy(scaled(F.linear(h, head), scales), t, reduction="sum"))
        for h, t in pairs
    )


def _labelled_hidden(
    model: nn.Module, batch: Blocks, *, every_layer: bool = False
) -> tuple[list[Tensor], Tensor]:
    """(hidden states [L, H] that predict a labelled token, those tokens [L]).

    model: a causal language model, plain or in peft's wrapper; only its decoder runs. The last
    hidden states are what the vocabulary projection reads; before them, if asked, the outputs of
    every layer but the last.
    """
    with whole_blocks(_causal(model).config, batch.input_ids.shape[1]):
        out = _causal(model).model(
            input_ids=batch.input_ids, use_cache=False, output_hidden_states=every_layer
        )
    layers = out.hidden_states[1:] if every_layer else [out.last_hidden_state]
    places = batch.places()
    targets = batch.labels.flatten().index_select(0, places + 1)
    return [hidden.flatten(0, 1).index_select(0, places) for hidden in layers], targets


def _check_labelled(targets: Tensor) -> None:
    if not len(targets):
        raise ValueError(
            "no token of the batch is labelled, so it has no mean loss; leave blocks without a "
            "label out, as data.blocks does"
        )


def _scales(model: nn.Module) -> Scales:
    return scales_of(_causal(model).config)


def scaled(logits: Tensor, scales: Scales) -> Tensor:
    """What the model makes of its head's products [.., V], in fp32."""
    if scales.logits != 1:
        logits = logits * scales.logits
    cap = scales.logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _slope(scaled: Tensor, scales: Scales) -> Tensor | float:
    """The derivative of `scaled`, from what it gave."""
    if scales.logit_cap is None:
        return scales.logits
    return scales.logits * (1 - (scaled / scales.logit_cap).square())


def _causal(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _autocast(*values: Tensor) -> list[Tensor]:
    """The values in autocast's type, where it is on: cast once for all chunks."""
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(values)
    return [value.to(torch.get_autocast_dtype(device)) for value in values]


def _projected(hidden: Tensor, head: nn.Linear, chunk_loss: ChunkLoss, scales: Scales) -> Tensor:
    """Sum of `chunk_loss` over hidden [L, H] projected by `head`; gradients to hidden and head.

    Raises ValueError for a head with a bias: no supported family has one.
    """
    if head.bias is not None:
        raise ValueError(
            "lm_head has a bias; expected none, as in every supported family. Use a model of one "
            "of these families."
        )
    values = _autocast(hidden, head.weight)
    if not torch.is_grad_enabled():  # `needs_input_grad` does not know of it
        values = [value.detach() for value in values]
    total: Tensor = _ChunkedLoss.apply(*values, chunk_loss, scales)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """The gradients are made in the forward, chunk by chunk, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, scales: Scales
    ) -> Tensor:
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        differentiated = wants_hidden or wants_weight
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # The sum over chunks is kept in fp32 whatever the type of the weight.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            tokens = slice(start, start + CHUNK_TOKENS)
            logits = scaled(F.linear(hidden[tokens], weight).float(), scales)
            slope = _slope(logits, scales) if differentiated else 1.0
            loss, gradient = chunk_loss(logits, tokens, differentiated)
            total += loss
            if gradient is None:
                continue
            gradient = gradient if isinstance(slope, float) and slope == 1 else gradient * slope
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[tokens])
            if d_weight is not None:
                d_weight += gradient.T @ hidden[tokens]
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        saved = (None if d is None else d * scale.to(d.dtype) for d in ctx.saved_tensors)
        return *saved, None, None
