"""What a model loses, in the precision it trains in, and what its figures say of it."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import TextLoss, text_loss
from atp_edge.losses import language_loss
from atp_edge.model.sharded import keep_in_step
from atp_edge.run import ranks


def loss_of(model: nn.Module, blocks: Blocks, accelerator: Accelerator) -> TextLoss:
    """What a model loses on blocks, in the precision it trains in; every rank reads a part.

    Raises ValueError where no token of the blocks is labelled.
    """
    mine = torch.arange(ranks.rank(), len(blocks.input_ids), ranks.size())
    with accelerator.autocast():
        loss = text_loss(model, blocks.rows(mine))
        keep_in_step(model, len(loss.nats), lambda: _read(model, blocks.first(1)))
    return interleaved(ranks.of_all(loss))


@torch.no_grad()
def _read(model: nn.Module, block: Blocks) -> None:
    """A pass through a model whose outcome is not wanted."""
    language_loss(model, block.to(next(model.parameters()).device))


def interleaved(parts: list[TextLoss]) -> TextLoss:
    """The losses of all blocks, of which part i has those at i, i + len(parts), ..."""
    in_turn = zip_longest(*(zip(p.nats, p.tokens, strict=True) for p in parts))
    found = [block for turn in in_turn for block in turn if block is not None]
    return TextLoss(nats=tuple(n for n, _ in found), tokens=tuple(t for _, t in found))


def figures_of(loss: TextLoss) -> dict[str, Any]:
    """Perplexity, and nats a token of every block: what two models differ by is paired there."""
    return {"perplexity": loss.perplexity, "block_losses": loss.by_block}
