"""Three splits that share no document: train, decision and test.

Splits are drawn by document from a hash of the seed and the text, so that they depend on neither
order nor run; a document of the decision or test split that nearly repeats one of another split is
taken out and counted.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from atp_edge.data.blocks import Blocks, _pack
from atp_edge.data.documents import Document

SPLITS = ("train", "decision", "test")
# A document of which this share of 8-word shingles also occurs in another split is a near copy.
NEAR_DUPLICATE_SHARE = 0.5
# Packed of a split where there is so much, however short the run: their order is then the same.
ENOUGH_BLOCKS = 4096
VALIDATION_BLOCKS = 8
CALIBRATION_BLOCKS = 32
_SHINGLE_WORDS = 8
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What the splits hold."""

    documents: dict[str, int]
    tokens: dict[str, int]
    duplicates_removed: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Train, decision and test blocks, disjoint by document."""

    train: Blocks
    decision: Blocks
    test: Blocks
    report: SplitReport

    @property
    def validation(self) -> Blocks:
        """The blocks that tuning is validated on as it goes."""
        return self.decision.spread(VALIDATION_BLOCKS)

    @property
    def calibration(self) -> Tensor:
        """Token ids [N, T] of the train split, for quantizers that read text."""
        return self.train.spread(CALIBRATION_BLOCKS).input_ids


def split_documents(
    documents: list[Document],
    *,
    seed: int,
    decision_share: float = 0.1,
    test_share: float = 0.1,
) -> dict[str, list[Document]]:
    """Documents of train, decision and test: drawn by hash, near copies of earlier splits out."""
    if not 0 < decision_share + test_share < 1 or min(decision_share, test_share) <= 0:
        raise ValueError(
            f"decision share {decision_share} and test share {test_share}: expected both above 0 "
            "and their sum below 1"
        )
    drawn: dict[str, list[Document]] = {name: [] for name in SPLITS}
    ordered = sorted(documents, key=lambda d: _draw(d, seed))
    for document in ordered:
        at = _draw(document, seed) / 2**64
        name = (
            "test"
            if at < test_share
            else ("decision" if at < test_share + decision_share else "train")
        )
        drawn[name].append(document)
    return _without_near_copies(drawn)


def make_splits(
    documents: list[Document],
    tokenizer: Any,
    *,
    block_tokens: int,
    seed: int,
    decision_share: float = 0.1,
    test_share: float = 0.1,
    most_blocks: int = ENOUGH_BLOCKS,
) -> Splits:
    """Three disjoint splits of packed blocks [N, block_tokens].

    most_blocks: blocks kept of a split at most. Raises ValueError when a split gets no block.
    """
    kept = split_documents(
        documents, seed=seed, decision_share=decision_share, test_share=test_share
    )
    blocks = {name: _pack(kept[name], tokenizer, block_tokens, most_blocks) for name in SPLITS}
    for name, block in blocks.items():
        if not len(block.input_ids):
            raise ValueError(
                f"the {name} split has no block of {block_tokens} tokens (of {len(kept[name])} "
                "documents): give more text, or a smaller --dataset-block-tokens"
            )
    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda d: d.text):
        digest.update(document.text.encode())
    return Splits(
        **blocks,
        report=SplitReport(
            documents={name: len(kept[name]) for name in SPLITS},
            tokens={name: block.input_ids.numel() for name, block in blocks.items()},
            duplicates_removed=len(documents) - sum(map(len, kept.values())),
            sha256=digest.hexdigest(),
        ),
    )


def _draw(document: Document, seed: int) -> int:
    """A 64-bit number that follows from the seed and the text alone."""
    digest = hashlib.blake2b(f"{seed}\0{document.text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _shingles(document: Document) -> Hashes:
    """Distinct hashes of every run of 8 words, lower-cased, punctuation dropped."""
    words = re.findall(r"\w+", document.text.lower())
    codes = np.array([_word_code(word) for word in words], dtype=np.uint64)
    if len(codes) < _SHINGLE_WORDS:
        return np.unique(codes)
    windows = np.lib.stride_tricks.sliding_window_view(codes, _SHINGLE_WORDS)
    multipliers = np.array([pow(0x100000001B3, i, 2**64) for i in range(_SHINGLE_WORDS)], np.uint64)
    return np.unique((windows * multipliers).sum(axis=1, dtype=np.uint64))


@cache
def _word_code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def _without_near_copies(drawn: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Decision and test without documents that nearly repeat one of the splits before them."""
    kept = {"train": drawn["train"]}
    seen = [_shingles(document) for document in drawn["train"]]
    for name in ("decision", "test"):
        known = np.unique(np.concatenate(seen)) if seen else np.array([], np.uint64)
        shingles = [_shingles(document) for document in drawn[name]]
        fresh = [_share_of(s, known) < NEAR_DUPLICATE_SHARE for s in shingles]
        kept[name] = [d for d, ok in zip(drawn[name], fresh, strict=True) if ok]
        seen += [s for s, ok in zip(shingles, fresh, strict=True) if ok]
    return kept


def _share_of(shingles: Hashes, known: Hashes) -> float:
    """Share of the shingles that are in `known` (sorted)."""
    if not len(shingles) or not len(known):
        return 0.0
    places = np.searchsorted(known, shingles).clip(max=len(known) - 1)
    return float((known[places] == shingles).mean())
