"""Documents that nearly repeat one of another split.

By Broder's containment of shingles (On the resemblance and containment of documents, 1997): the
share of a document's runs of 8 words that also occur in another split. PaLM tells contaminated test
text so, from a share of 0.7 on (arXiv 2204.02311, section 8); here a half is a near copy.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from atp_edge.data.documents import Document

NEAR_COPY_SHARE = 0.5
_SHINGLE_WORDS = 8
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def without_near_copies(
    drawn: dict[str, list[Document]], protected: Sequence[Document] = ()
) -> tuple[dict[str, list[Document]], float]:
    """Decision and test without documents that nearly repeat one of the splits before them, the
    test without those that nearly repeat a protected one; and the share of the remaining test's
    shingles that the train split has too."""
    train = _distinct([_shingles(document) for document in drawn["train"]])
    decision, of_decision = _fresh(drawn["decision"], train)
    of_protected = [_shingles(document) for document in protected]
    test, of_test = _fresh(drawn["test"], _distinct([train, of_decision, *of_protected]))
    kept = {"train": drawn["train"], "decision": decision, "test": test}
    return kept, _share_of(of_test, train)


def fresh_of(documents: Sequence[Document], known: Sequence[Document]) -> list[Document]:
    """The documents that nearly repeat none of the known ones."""
    return _fresh(list(documents), _distinct([_shingles(document) for document in known]))[0]


def told_apart(documents: Sequence[Document]) -> list[Document]:
    """The documents without those that say word for word what one before them says."""
    first: dict[tuple[str, ...], Document] = {}
    for document in documents:
        first.setdefault(tuple(_words(document)), document)
    return list(first.values())


def _words(document: Document) -> list[str]:
    """Lower-cased, without punctuation; text without words is its own word."""
    return re.findall(r"\w+", document.compared.lower()) or [document.compared]


def _fresh(documents: list[Document], known: Hashes) -> tuple[list[Document], Hashes]:
    """The documents that nearly repeat nothing known, and their distinct shingles."""
    shingles = [_shingles(document) for document in documents]
    fresh = [_share_of(s, known) < NEAR_COPY_SHARE for s in shingles]
    kept = [document for document, ok in zip(documents, fresh, strict=True) if ok]
    return kept, _distinct([s for s, ok in zip(shingles, fresh, strict=True) if ok])


def _shingles(document: Document) -> Hashes:
    """Distinct hashes of every run of 8 words, lower-cased, punctuation dropped; of fewer words,
    of all together."""
    words = re.findall(r"\w+", document.compared.lower())
    codes = np.array([_word_code(word) for word in words], dtype=np.uint64)
    size = min(_SHINGLE_WORDS, len(codes))
    if not size:
        return codes
    windows = np.lib.stride_tricks.sliding_window_view(codes, size)
    multipliers = np.array([pow(0x100000001B3, i, 2**64) for i in range(size)], np.uint64)
    return np.unique((windows * multipliers).sum(axis=1, dtype=np.uint64))


@cache
def _word_code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def _distinct(shingles: Sequence[Hashes]) -> Hashes:
    return np.unique(np.concatenate([np.array([], np.uint64), *shingles]))


def _share_of(shingles: Hashes, known: Hashes) -> float:
    """Share of the shingles that are in `known` (sorted)."""
    if not len(shingles) or not len(known):
        return 0.0
    places = np.searchsorted(known, shingles).clip(max=len(known) - 1)
    return float((known[places] == shingles).mean())
