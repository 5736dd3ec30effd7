"""What a model loses on text: nats by block, and perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from atp_edge.data.blocks import Blocks
from atp_edge.losses import language_loss
from atp_edge.run.watched import counted


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Negative log-likelihood of a text, block by block: nats, and labelled tokens of each."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def by_block(self) -> list[float]:
        """Nats a token of every block."""
        return [nats / tokens for nats, tokens in zip(self.nats, self.tokens, strict=True)]


@torch.no_grad()
def text_loss(model: nn.Module, blocks: Blocks) -> TextLoss:
    """What a model loses on blocks [N, T]; those without a labelled token are left out."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, counts = [], []
    for i in counted(range(len(blocks.input_ids)), "measuring"):
        block = blocks.rows([i]).to(device)
        labelled = int((block.labels[:, 1:] != -100).sum())
        if labelled:
            nats.append(float(language_loss(model, block)) * labelled)
            counts.append(labelled)
    model.train(was_training)
    return TextLoss(nats=tuple(nats), tokens=tuple(counts))


def perplexity(model: nn.Module, blocks: Blocks) -> float:
    """exp of the mean negative log-likelihood of the labelled tokens of blocks [N, T]."""
    return text_loss(model, blocks).perplexity
