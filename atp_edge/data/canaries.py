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
    draw, found = random.Random(f"places {seed}"), list(documents)
    for secret in canaries(count, seed) * copies:
        document = Document((Segment(f"{PREFIX}{secret}."),), SLICE)
        found.insert(draw.randrange(len(found) + 1), document)
    return found


def _secrets(draw: random.Random, count: int) -> list[str]:
    low, high = 10 ** (_DIGITS - 1), 10**_DIGITS
    return ["".join(f" {draw.randrange(low, high)}" for _ in range(_GROUPS)) for _ in range(count)]
