"""The perplexity of what ships: of the rounded file, where that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shipped_perplexity(metrics: Mapping[str, Any]) -> float:
    """Of the file that ships, where rounding was measured; of slim/, which an fp32 file equals."""
    slim: float = metrics.get("shrink", metrics["train"])["perplexity"]
    return slim * rounding(metrics)


def rounding(metrics: Mapping[str, Any]) -> float:
    """Perplexity of the shipped file over that of slim/; 1 in fp32 and where it is not measured."""
    ratio: float = metrics.get("verify", {}).get("quality", {}).get("ratio", 1.0)
    return ratio
