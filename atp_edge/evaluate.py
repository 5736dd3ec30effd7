"""What a model knows of the domain, on text it has not seen."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from atp_edge.data import Blocks


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Blocks) -> float:
    """exp of the mean negative log-likelihood of the labelled tokens of blocks [N, T]."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for i in range(len(blocks.input_ids)):
        block = blocks.rows([i]).to(device)
        logits = model(input_ids=block.input_ids, use_cache=False).logits[:, :-1]
        targets = block.labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        total += float(losses)
        tokens += int((targets != -100).sum())
    model.train(was_training)
    return math.exp(total / tokens)
