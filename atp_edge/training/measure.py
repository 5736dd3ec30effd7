"""What a model loses, in the precision it trains in, and what its figures say of it."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import TextLoss, text_loss


def loss_of(model: nn.Module, blocks: Blocks, accelerator: Accelerator) -> TextLoss:
    """What a model loses on blocks, in the precision it trains in."""
    with accelerator.autocast():
        return text_loss(model, blocks)


def figures_of(loss: TextLoss) -> dict[str, Any]:
    """Perplexity, and nats a token of every block: what two models differ by is paired there."""
    return {"perplexity": loss.perplexity, "block_losses": loss.by_block}
