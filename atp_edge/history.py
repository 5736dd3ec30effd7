"""The history of a run, step by step, and the signs of one that goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["dense", "control", "recovery"]
WINDOW = 8
# Nats above the phase's best window: perplexity times 2.7. Blocks alone differ by less than 1.
LOSS_RISE = 1.0
# Share of structures that change sides in a generator step, over a window of them.
CHURN = 0.25


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step of the history."""

    step: int
    phase: Phase
    loss: float
    lr: float
    tokens: int
    seconds: float = 0.0
    decision_loss: float | None = None
    kept_share: float | None = None
    soft_share: float | None = None
    churn: float | None = None
    validation_loss: float | None = None


def read_history(folder: Path) -> list[Record]:
    """Every step on record in a run's folder."""
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]


def diverges(records: Sequence[Record]) -> str | None:
    """What is wrong with a phase's steps so far, or None.

    A loss that is not finite, a mean loss `LOSS_RISE` above the best of the phase, or a decision of
    which more than `CHURN` changes at every step.
    """
    losses = [record.loss for record in records]
    if losses and not math.isfinite(losses[-1]):
        return f"the loss is {losses[-1]}"
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
    if means and means[-1] > min(means) + LOSS_RISE:
        return f"the loss rose from {min(means):.2f} to {means[-1]:.2f}"
    churns = [record.churn for record in records if record.churn is not None]
    if len(churns) >= WINDOW and min(churns[-WINDOW:]) > CHURN:
        return f"{churns[-1]:.0%} of the decision changes at every step"
    return None
