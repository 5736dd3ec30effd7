"""Token blocks: packed from documents, and the order in which steps read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_edge.data.documents import Document
from atp_edge.data.encoding import IGNORED, Encoder


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Token blocks: input_ids and labels [N, T]; labels are -100 where nothing is learned.

    predicting: places [L] among the N * T tokens whose next one is labelled, where they are known:
    `to` finds them while the labels are still the host's, so that no device is asked.
    """

    input_ids: Tensor
    labels: Tensor
    predicting: Tensor | None = None

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
        places = self.places()
        return Blocks(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            predicting=places.to(device),
        )

    def places(self) -> Tensor:
        """`predicting`, found from the labels where it is not known."""
        if self.predicting is not None:
            return self.predicting
        next_one = torch.full_like(self.labels, IGNORED)
        next_one[:, :-1] = self.labels[:, 1:]
        return (next_one != IGNORED).flatten().nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Blocks of a split, and what was left out: `unlabelled` blocks in which nothing is learned."""

    blocks: Blocks
    unlabelled: int
    tokens: int
    """Read of the documents, whether they fill a block or not."""
    documents: int
    """Read, the last of them perhaps in part."""


def pack(documents: Iterable[Document], encoder: Encoder, block_tokens: int, most: int) -> Packed:
    """Documents joined and cut into blocks [N, block_tokens], `most` at most; a short last one is
    left, and so is one without a label, for its loss would be 0 / 0."""
    ids: list[int] = []
    labels: list[int] = []
    kept: list[int] = []
    start = read = 0
    for more_ids, more_labels in encoder.encode_all(documents):
        read += 1
        ids += more_ids
        labels += more_labels
        while start + block_tokens <= len(ids) and len(kept) < most:
            # The first token of a block is read and not predicted.
            if any(label != IGNORED for label in labels[start + 1 : start + block_tokens]):
                kept.append(start)
            start += block_tokens
        if len(kept) == most:
            break
    return Packed(
        blocks=Blocks(
            input_ids=_cut(ids, kept, block_tokens), labels=_cut(labels, kept, block_tokens)
        ),
        unlabelled=start // block_tokens - len(kept),
        tokens=len(ids),
        documents=read,
    )


def _cut(tokens: list[int], starts: list[int], size: int) -> Tensor:
    rows = [tokens[start : start + size] for start in starts]
    return torch.tensor(rows, dtype=torch.long).view(len(rows), size)


def drawn(blocks: Blocks, first: int, count: int, *, seed: int) -> Blocks:
    """`count` blocks from place `first` on of the endless order in which steps read them."""
    size = len(blocks.input_ids)
    picks = [_shuffled(size, seed, at // size)[at % size] for at in range(first, first + count)]
    return blocks.rows(torch.tensor(picks))


def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    # torch takes seeds of 64 bits.
    draw = torch.Generator().manual_seed((seed * 10_007 + epoch) % 2**63)
    return torch.randperm(count, generator=draw)
