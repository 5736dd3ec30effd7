"""What a model loses on text: nats by block, and perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atp_edge.data.blocks import Blocks
from atp_edge.losses import language_loss, sum_cross_entropy
from atp_edge.model.checkpoint import streamed_narrow
from atp_edge.model.families import (
    ModelShape,
    check_reads,
    longest_text,
    model_shape,
    scales_of,
)
from atp_edge.model.loading import tensor_files
from atp_edge.model.stream import reader_of
from atp_edge.run.watched import counted

_STREAMED_TOKENS, _STREAMED_BYTES = 2**14, 2**28
"""Read at once, and of the widest activation in fp32: more cost memory, fewer read the weights more
often."""


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
    """What a model loses on blocks [N, T]; those without a labelled token are left out. Raises
    ValueError for blocks of more tokens than it reads."""
    _check_blocks(model.config, blocks)
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


def streamed_blocks(shape: ModelShape, tokens: int) -> int:
    """Blocks of so many tokens that go through a layer together."""
    widest = max(layer.channels for layer in shape.layers)
    return max(1, min(_STREAMED_TOKENS, _STREAMED_BYTES // (4 * widest)) // tokens)


@torch.no_grad()
def streamed_text_loss(folder: Path, blocks: Blocks) -> TextLoss:
    """The same of a checkpoint, in fp32 on the CPU, one layer's weights in memory at a time."""
    device = torch.device("cpu")
    model, read = streamed_narrow(folder, device), reader_of(tensor_files(folder))
    _check_blocks(model.config, blocks)
    scales = scales_of(model.config)
    at_once = streamed_blocks(model_shape(model.config), blocks.input_ids.shape[1])
    nats, counts = [], []
    for ids, labels in zip(
        blocks.input_ids.split(at_once), blocks.labels.split(at_once), strict=True
    ):
        hidden = model.get_submodule("model")(input_ids=ids, use_cache=False).last_hidden_state
        head = read("lm_head.weight").float()
        for states, targets in zip(hidden, labels, strict=True):
            labelled = targets[1:] != -100
            if count := int(labelled.sum()):
                chosen = targets[1:][labelled]
                nats.append(sum_cross_entropy(states[:-1][labelled], head, chosen, scales))
                counts.append(count)
    return TextLoss(nats=tuple(nats), tokens=tuple(counts))


def _check_blocks(config: Any, blocks: Blocks) -> None:
    tokens = blocks.input_ids.shape[1]
    check_reads(longest_text(config), tokens, "a block of text", "take shorter blocks")


def perplexity(model: nn.Module, blocks: Blocks) -> float:
    """exp of the mean negative log-likelihood of the labelled tokens of blocks [N, T]."""
    return text_loss(model, blocks).perplexity
