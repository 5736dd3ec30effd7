"""Near distractors: texts that share the rare words of an answer, and no run of words with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

CHOICES = 4

# Options of one item may not share a run of this many words: they would be one text.
_SHARED_RUN = 4


@cache
def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


# Near distractors


def near_texts(answer: str, pools: Sequence[Sequence[str]], rarity: dict[str, float]) -> list[str]:
    """Distractors: of the first pool, then of the next, those nearest to the answer in rare words.

    No two texts share a run of words, nor one with the answer.
    """
    taken = [answer]
    for pool in pools:
        for text in sorted(set(pool), key=lambda t: (-_closeness(answer, t, rarity), t)):
            if len(taken) < CHOICES and all(_distinct(text, other) for other in taken):
                taken.append(text)
    return taken[1:]


def rarity_of(texts: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency of every word."""
    found = Counter(word for text in texts for word in set(_words(text)))
    return {word: math.log(len(texts) / count) for word, count in found.items()}


def _closeness(a: str, b: str, rarity: dict[str, float]) -> float:
    """Cosine of the two sets of words, weighed by rarity squared."""
    first, second = set(_words(a)), set(_words(b))

    def weight(words: set[str]) -> float:
        return sum(rarity.get(word, 0.0) ** 2 for word in words)

    return weight(first & second) / math.sqrt((weight(first) * weight(second)) or 1.0)


def _distinct(a: str, b: str) -> bool:
    runs = [set(_runs(_words(text))) for text in (a, b)]
    return not runs[0] & runs[1]


def _runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    size = min(_SHARED_RUN, len(words))
    yield from (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
