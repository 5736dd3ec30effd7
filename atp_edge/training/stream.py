"""Batches by step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks, batches


class BatchStream:
    """Train batches by step: the batch of a step depends on the seed and the step alone."""

    def __init__(self, blocks: Blocks, config: Config, device: torch.device) -> None:
        self.blocks, self.config, self.device = blocks, config, device
        self.next_index = -1
        self.iterator: Iterator[Blocks] = iter(())

    def __call__(self, index: int) -> Blocks:
        if index != self.next_index:
            self.iterator = batches(
                self.blocks,
                batch_blocks=self.config.train.batch_blocks,
                seed=self.config.seed,
                start_step=index,
            )
        self.next_index = index + 1
        return next(self.iterator).to(self.device)
