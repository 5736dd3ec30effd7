"""How far a prompt lies outside the domain that a slim model was made for: numpy alone.

A profile is a table of bits: which pairs of neighbouring tokens the text of the domain has in two
documents or more, hashed. The score of a prompt is the share of its pairs that are not among them.
Of the text itself the table keeps nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

BITS = 1 << 20
LENGTHS = (8, 16, 32, 64, 128)
"""A prompt is judged by the threshold of the longest of these that it has; the profile's own."""
PROFILE = "domain.npz"
_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA77  # odd 32-bit constants of multiplicative hashes


@dataclass(frozen=True, kw_only=True)
class Distance:
    """score: pairs that the domain has not, 0 to 1. threshold: None for a prompt that is too short
    to be told."""

    score: float
    threshold: float | None

    @property
    def outside(self) -> bool:
        return self.threshold is not None and self.score > self.threshold


@dataclass(frozen=True, kw_only=True)
class DomainProfile:
    """bits: packed, [BITS / 8]. thresholds: by the least number of tokens."""

    bits: NDArray[np.uint8]
    thresholds: Mapping[int, float]

    def score(self, ids: Sequence[int]) -> float:
        """The share of pairs that the domain has not; 0 for less than two tokens."""
        places = _places(ids)
        if not len(places):
            return 0.0
        known = (self.bits[places >> 3] >> (places & 7)) & 1
        return float(1 - known.mean())

    def distance(self, ids: Sequence[int]) -> Distance:
        """A prompt of token ids, as the model reads it."""
        long_enough = [n for n in self.thresholds if n <= len(ids)]
        threshold = self.thresholds[max(long_enough)] if long_enough else None
        return Distance(score=self.score(ids), threshold=threshold)


def profile_bits(documents: Iterable[Sequence[int]]) -> NDArray[np.uint8]:
    """The table of a text: pairs that two documents or more have."""
    counts = np.zeros(BITS, np.uint8)
    for ids in documents:
        places = np.unique(_places(ids))
        counts[places] = np.minimum(counts[places] + 1, 2)
    return np.packbits(counts == 2, bitorder="little")


def _places(ids: Sequence[int]) -> NDArray[np.int64]:
    """Where the pairs of neighbours lie in the table."""
    tokens = np.asarray(ids, np.uint64)
    if len(tokens) < 2:
        return np.zeros(0, np.int64)
    mixed = tokens[:-1] * np.uint64(_FIRST) + tokens[1:] * np.uint64(_SECOND)
    return ((mixed ^ (mixed >> np.uint64(17))) % np.uint64(BITS)).astype(np.int64)


def write_profile(profile: DomainProfile, path: Path) -> None:
    """One .npz file of plain arrays."""
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            bits=profile.bits,
            lengths=np.array(sorted(profile.thresholds), np.int64),
            thresholds=np.array([profile.thresholds[n] for n in sorted(profile.thresholds)]),
        )


def read_profile(path: Path) -> DomainProfile:
    """Raises ValueError naming the file for one that is no profile."""
    try:
        with np.load(path, allow_pickle=False) as held:
            bits, lengths, thresholds = held["bits"], held["lengths"], held["thresholds"]
        whole = bits.shape == (BITS // 8,) and bits.dtype == np.uint8
        lists = lengths.ndim == 1 and lengths.dtype.kind in "iu" and thresholds.dtype.kind == "f"
        alike = lists and lengths.shape == thresholds.shape
        if not whole or not alike or not np.isfinite(thresholds).all():
            raise ValueError("its arrays are of another form")
        if len(np.unique(lengths)) < len(lengths):
            raise ValueError("a length stands in it twice")
        if ((thresholds < 0) | (thresholds > 1)).any():
            raise ValueError("a threshold is not between 0 and 1")
    except (ValueError, TypeError, KeyError, BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is no profile of a domain ({error}); write it again with `atp-edge gate`"
        ) from None
    pairs = zip(lengths.tolist(), thresholds.tolist(), strict=True)
    return DomainProfile(bits=bits, thresholds=dict(pairs))
