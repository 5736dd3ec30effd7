"""The history of a run, step by step, and the signs of one that goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from atp_edge.run.files import write_atomically

Phase = Literal["dense", "control", "recovery"]
PHASE_NAMES: dict[Phase, str] = {
    "dense": "dense baseline",
    "control": "joint",
    "recovery": "recovery",
}
"""As people read them."""
LOSS_WINDOW = 16
# Nats above the phase's steps before: perplexity times 2.7. Of medians, for single blocks lie three
# nats above their neighbours, several to a window: by the mean of 8 a sound run was stopped
# (docs/research/log.md).
LOSS_RISE = 1.0
CHURN_WINDOW = 8
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
    """Every step on record in a run's folder. Raises ValueError naming the line that is none."""
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: no step of a run ({error}); put the file back, or delete "
                "it and the report has no curves"
            ) from None
    return records


def write_history(folder: Path, records: Iterable[Record]) -> None:
    """Write every step to a run's folder."""
    lines = (json.dumps(asdict(record)) for record in records)
    write_atomically(folder / "history.jsonl", "\n".join(lines) + "\n")


def diverges(records: Sequence[Record]) -> str | None:
    """What is wrong with a phase's steps so far, or None.

    A loss that is not finite, a median over `LOSS_WINDOW` steps `LOSS_RISE` above that of the steps
    before, or a decision of which more than `CHURN` changes at every step. The best window before
    would be no measure: one of easy text lies a nat below a healthy one of hard text.
    """
    losses = [record.loss for record in records]
    if losses and not math.isfinite(losses[-1]):
        return f"the loss is {losses[-1]}"
    before, last = losses[:-LOSS_WINDOW], losses[-LOSS_WINDOW:]
    if len(before) >= LOSS_WINDOW and median(last) > median(before) + LOSS_RISE:
        return f"the loss rose from {median(before):.2f} to {median(last):.2f}"
    churns = [record.churn for record in records if record.churn is not None]
    if len(churns) >= CHURN_WINDOW and min(churns[-CHURN_WINDOW:]) > CHURN:
        return f"{churns[-1]:.0%} of the decision changes at every step"
    return None
