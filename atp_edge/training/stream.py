"""Batches by step, and this process's part of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks, drawn
from atp_edge.data.encoding import IGNORED
from atp_edge.run import ranks


@dataclass(frozen=True, kw_only=True)
class Part:
    """Blocks that go through the model together.

    share: their labelled tokens over the step's, of all ranks. The mean losses of all parts, each
    times its share, add up to the step's mean loss, and so do their gradients.
    """

    blocks: Blocks
    share: float | Tensor


class BatchStream:
    """Train batches by step: the batch of a step depends on the seed and the step alone."""

    def __init__(self, blocks: Blocks, config: Config, device: torch.device) -> None:
        self.blocks, self.config, self.device = blocks, config, device

    def tokens_until(self, step: int) -> int:
        """Tokens of all steps before this one."""
        return step * self.config.train.batch_blocks * self.blocks.input_ids.shape[1]

    def __call__(self, index: int) -> Iterator[Part]:
        """This rank's parts of a step's batch: rows `rank::size`, `micro_blocks` at a time."""
        count = self.config.train.batch_blocks
        batch = drawn(self.blocks, index * count, count, seed=self.config.seed)
        labelled = (batch.labels[:, 1:] != IGNORED).sum(1)
        rows = torch.arange(ranks.rank(), count, ranks.size())
        for part in rows.split(self.config.train.micro_blocks or count):
            share = float(labelled[part].sum() / labelled.sum())
            yield Part(blocks=batch.rows(part).to(self.device), share=share)
