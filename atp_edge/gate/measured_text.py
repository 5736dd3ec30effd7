"""Both models over the same documents, token by token: loss, divergence, confidence."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atp_edge.data.documents import Document
from atp_edge.data.encoding import IGNORED, Encoder
from atp_edge.evaluation.scoring import LanguageModel, batches_of, padded
from atp_edge.gate.statistics import Floats

BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Text:
    """One document to be read, cut to what is measured of it."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    slice: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of every labelled token [N] of all texts: its text, and what both models say there.

    nats: its loss; confidence: of the likeliest token; right: whether that is it; kl: of the slim
    model's distribution from the dense one's, nats. slices: of the texts.
    """

    text: NDArray[np.int64]
    slices: tuple[str, ...]
    nats: tuple[Floats, Floats]
    confidence: tuple[Floats, Floats]
    right: tuple[Floats, Floats]
    kl: Floats
    same_top: Floats

    def by_text(self, values: Floats) -> Floats:
        """Sums over the tokens of every text."""
        sums: Floats = np.bincount(self.text, values, minlength=len(self.slices)).astype(np.float64)
        return sums

    @property
    def tokens(self) -> Floats:
        return self.by_text(np.ones(len(self.text)))


def texts_of(
    documents: Sequence[Document], tokenizer: Any, *, most: int, tokens: int, seed: int
) -> list[Text]:
    """Documents in turn over their slices, so that rare ones are read too, each cut to `tokens`.

    Of a long plain text a window is read, drawn by the seed; prompts and conversations are read
    from their start or, after a long prompt, so that half of what is read may be answer.
    """
    draw, encoder = random.Random(seed), Encoder(tokenizer)
    found: list[Text] = []
    for document in in_turn_by_slice(documents, draw):
        if len(found) == most:
            break
        ids, labels = encoder.encode(document)
        plain = len(document.segments) == 1 and not document.rendered
        most_start = max(0, len(ids) - tokens)
        start = draw.randrange(most_start + 1) if plain else _before_answer(labels, tokens)
        cut = slice(min(start, most_start), start + tokens)
        if any(label != IGNORED for label in labels[cut][1:]):
            found.append(Text(ids=tuple(ids[cut]), labels=tuple(labels[cut]), slice=document.slice))
    return found


def _before_answer(labels: Sequence[int], tokens: int) -> int:
    """Where to begin, so that the first answer begins in the first half of so many tokens."""
    first = next((i for i, label in enumerate(labels) if i and label != IGNORED), 0)
    return max(0, first - tokens // 2)


def in_turn_by_slice(documents: Sequence[Document], draw: random.Random) -> Iterator[Document]:
    """Shuffled; the first of every slice, then the second of every slice, and so on."""
    by_slice: dict[str, list[Document]] = {}
    for document in draw.sample(list(documents), len(documents)):
        by_slice.setdefault(document.slice, []).append(document)
    for i in range(max(map(len, by_slice.values()), default=0)):
        yield from (rows[i] for rows in by_slice.values() if i < len(rows))


@torch.no_grad()
def measure(dense: LanguageModel, slim: LanguageModel, texts: Sequence[Text]) -> Measured:
    """Both models over all texts. Raises ValueError where there is none, and where the dense model
    answers with no number: nothing can be compared with it."""
    if not texts:
        raise ValueError("no document with two tokens or more; give more text")
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    columns: list[list[Any]] = []
    for batch in batches_of(order, lambda i: len(texts[i].ids), BATCH_TOKENS):
        tokens, mask = padded([texts[i].ids for i in batch], 0)
        logits = [m.logits(tokens, mask, last=tokens.shape[1]) for m in (dense, slim)]
        for row, i in enumerate(batch):
            labels = torch.tensor(texts[i].labels[1:])
            at = (labels != IGNORED).nonzero()[:, 0]
            columns.append([np.full(len(at), i), *_of_row(logits, row, at, labels[at])])
    text, nats_d, sure_d, right_d, nats_s, sure_s, right_s, kl, same = (
        np.concatenate(column) for column in zip(*columns, strict=True)
    )
    if not np.isfinite(nats_d).all():
        raise ValueError(
            "the dense model answers with no number (NaN or infinity): nothing can be compared "
            "with it; tune it again"
        )
    return Measured(
        text=text,
        slices=tuple(one.slice for one in texts),
        nats=(nats_d, nats_s),
        confidence=(sure_d, sure_s),
        right=(right_d, right_s),
        kl=kl,
        same_top=same,
    )


def _of_row(logits: list[Any], row: int, at: Any, labels: Any) -> list[Floats]:
    """nats, confidence and right of dense, of slim; KL; whether the likeliest token is the same."""
    found, logs, tops = [], [], []
    for one in logits:
        log = one[row, at].float().cpu().log_softmax(-1)
        best, top = log.max(-1)
        found += [-log.gather(-1, labels[:, None])[:, 0], best.exp(), (top == labels).float()]
        logs.append(log)
        tops.append(top)
    share = logs[0].exp()  # What is impossible for the dense model adds nothing.
    kl = torch.where(share == 0, 0.0, share * (logs[0] - logs[1])).sum(-1)
    return [x.double().numpy() for x in (*found, kl, (tops[0] == tops[1]).float())]
