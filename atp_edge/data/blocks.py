"""Token blocks: packed from documents, and the order in which steps read them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atp_edge.data.documents import Document


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Token blocks: input_ids and labels [N, T]; labels are -100 where nothing is learned."""

    input_ids: Tensor
    labels: Tensor

    def rows(self, index: list[int] | Tensor) -> Blocks:
        return Blocks(input_ids=self.input_ids[index], labels=self.labels[index])

    def first(self, count: int) -> Blocks:
        return Blocks(input_ids=self.input_ids[:count], labels=self.labels[:count])

    def spread(self, count: int) -> Blocks:
        """`count` blocks evenly spaced over all (all, if they are fewer): neighbours are often of
        one document."""
        total = len(self.input_ids)
        return self.rows(torch.linspace(0, total - 1, min(count, total)).round().long())

    def to(self, device: torch.device | str) -> Blocks:
        return Blocks(input_ids=self.input_ids.to(device), labels=self.labels.to(device))


def _pack(documents: list[Document], tokenizer: Any, block_tokens: int, most: int) -> Blocks:
    """Documents joined by the end-of-text token and cut into blocks; a short last one is left."""
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        for segment in document.segments:
            tokens = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if segment.learn else [-100] * len(tokens)
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
        if len(ids) >= most * block_tokens:
            break
    count = min(len(ids) // block_tokens, most)
    shape = (count, block_tokens)
    return Blocks(
        input_ids=torch.tensor(ids[: count * block_tokens], dtype=torch.long).view(shape),
        labels=torch.tensor(labels[: count * block_tokens], dtype=torch.long).view(shape),
    )


def batches(
    blocks: Blocks, *, batch_blocks: int, seed: int, start_step: int = 0
) -> Iterator[Blocks]:
    """Endless batches [batch_blocks, T]; the batch of a step follows from the seed and the step."""
    for step in itertools.count(start_step):
        yield drawn(blocks, step * batch_blocks, batch_blocks, seed=seed)


def drawn(blocks: Blocks, first: int, count: int, *, seed: int) -> Blocks:
    """`count` blocks from place `first` on of the endless order in which steps read them."""
    size = len(blocks.input_ids)
    picks = [_shuffled(size, seed, at // size)[at % size] for at in range(first, first + count)]
    return blocks.rows(torch.tensor(picks))


def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 10_007 + epoch))
