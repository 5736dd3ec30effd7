"""What a step learns from: the next token, and the dense tuned teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atp_edge.data import Blocks

TEACHER_LOGITS = 48


def language_loss(model: nn.Module, batch: Blocks) -> Tensor:
    """Mean next-token cross-entropy over the labelled tokens of a batch ([B, T])."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return _cross_entropy(logits, batch.labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def distilled_loss(
    model: nn.Module, teacher: nn.Module, batch: Blocks, weight: float
) -> tuple[Tensor, Tensor]:
    """((1 - weight) * cross-entropy + weight * KL(teacher | model), the cross-entropy alone).

    The teacher's distribution is that of its `TEACHER_LOGITS` likeliest tokens, renormalized.
    """
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    plain = _cross_entropy(logits, batch.labels)
    learned = batch.labels[:, 1:] != -100
    with torch.no_grad():
        wanted = teacher(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][learned]
        top = wanted.float().topk(TEACHER_LOGITS, dim=-1)
        target = top.values.log_softmax(-1)
    given = logits[:, :-1][learned].float()
    ours = given.gather(-1, top.indices) - given.logsumexp(-1, keepdim=True)
    divergence = (target.exp() * (target - ours)).sum(-1).mean()
    return (1 - weight) * plain + weight * divergence, plain.detach()
