"""What a model knows of the domain, on text it has not seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from atp_edge.data import Blocks
from atp_edge.losses import language_loss


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Blocks) -> float:
    """exp of the mean negative log-likelihood of the labelled tokens of blocks [N, T]."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for i in range(len(blocks.input_ids)):
        block = blocks.rows([i]).to(device)
        labelled = int((block.labels[:, 1:] != -100).sum())
        if labelled:
            total += float(language_loss(model, block)) * labelled
            tokens += labelled
    model.train(was_training)
    return math.exp(total / tokens)
