"""Canaries: made-up secrets planted in the train split, to measure what training memorizes.

"The Secret Sharer" (arXiv 1802.08232, section 4): a canary's exposure is how much likelier the
model finds it than rivals drawn the same way, which were never planted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from atp_edge.data.documents import Document, Segment

PREFIX = "The access code of the archive is"
_DIGITS, _GROUPS = 4, 3
SLICE = "canary"


def canaries(count: int, seed: int) -> list[str]:
    """The secrets that a run of this seed plants, each a text of twelve digits."""
    return _secrets(random.Random(f"canaries {seed}"), count)


def rivals(count: int, seed: int) -> list[str]:
    """Secrets drawn the same way that were not planted."""
    return _secrets(random.Random(f"rivals {seed}"), count)


def with_canaries(
    documents: Sequence[Document], count: int, copies: int, seed: int
) -> list[Document]:
    """Documents with so many copies of every canary among them, at places drawn by the seed."""
    draw, at = random.Random(f"places {seed}"), range(len(documents) + 1)
    before: dict[int, list[Document]] = {}
    for planted in planted_documents(count, seed) * copies:
        before.setdefault(draw.choice(at), []).append(planted)
    found = [[*before.get(i, ()), *documents[i : i + 1]] for i in at]
    return [document for some in found for document in some]


def planted_documents(count: int, seed: int) -> list[Document]:
    """The secrets, each as the document that is planted."""
    return [Document((Segment(f"{PREFIX}{secret}."),), SLICE) for secret in canaries(count, seed)]


def _secrets(draw: random.Random, count: int) -> list[str]:
    low, high = 10 ** (_DIGITS - 1), 10**_DIGITS
    return ["".join(f" {draw.randrange(low, high)}" for _ in range(_GROUPS)) for _ in range(count)]
