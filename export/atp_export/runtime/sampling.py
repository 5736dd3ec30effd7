"""How a token is chosen from logits, and where a text stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; temperature 0 is greedy, top_k 0 all tokens. Raises ValueError for
    values that choose nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: expected more than 0, 1 (all) at most")
        for name in ("top_k", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 or more")


def choose(logits: NDArray[np.float32], sampling: Sampling, draw: np.random.Generator) -> int:
    """The next token from logits [V]: greedy, or by temperature, top-k and top-p (nucleus).

    Raises ValueError for logits that are no numbers.
    """
    best = int(logits.argmax())  # of a NaN, if there is one
    if not np.isfinite(logits[best]):
        raise ValueError(
            f"the model's logits are {logits[best]}: its weights are damaged, or too large for "
            "their precision; `atp-edge verify --manifest FOLDER` tells which"
        )
    if sampling.temperature <= 0:
        return best
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    nucleus = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
    weights = weights[:nucleus] / weights[:nucleus].sum()
    return int(draw.choice(order[:nucleus], p=weights))


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of its stop strings. Raises ValueError for an empty one, at which
    every text would end."""
    if "" in stop:
        raise ValueError("stop '': expected a text of one character or more")
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text
