"""Proof that an exported folder computes what the PyTorch model that it came from does.

In three steps, so that rounding hides no fault:

1. The tensors of the file are the model's own, or its rounded ones (`stored`).
2. The graph, its types widened to fp32, equals the model with the file's tensors (`widen`,
   `reference`), to what fp32 can tell; with a faint residual stream again (`faint`).
3. What ships, on its execution provider, equals the widened graph to its precision's arithmetic.

Bounds and what they rest on: docs/verify.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atp_edge.data.encoding import prompt_ids
from atp_export.other_layouts import no_model_in
from atp_export.runtime import Session
from atp_export.verification.checks import Check, at_most
from atp_export.verification.compare import distance
from atp_export.verification.float64_reference import Rounding
from atp_export.verification.proof import RELATIVE_TOLERANCE, UNREADABLE, Proof

__all__ = ["RELATIVE_TOLERANCE", "VerifyReport", "verify"]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The checks, and figures of what ships against PyTorch with the same rounded weights.

    Errors of logits are absolute, over every way of reading and all positions that were asked for.
    """

    passed: bool
    checks: tuple[Check, ...]
    failures: tuple[str, ...]
    """What the checks that failed say, and where the graph first departs."""
    provider: str
    logits_max_error: float
    logits_mean_error: float
    logits_relative_error: float
    """Root mean square of the errors over the standard deviation of the logits."""
    greedy_same: int
    greedy_total: int
    stepwise_max_error: float
    batched_same: bool
    """A ragged, padded batch generates what single rows do."""
    positions: tuple[int, ...]
    position_max_error: tuple[float, ...]
    position_mean_error: tuple[float, ...]
    """Both by position in the long text, over the vocabulary."""
    rounding: Rounding | None
    """Distances to the model in float64; measured only where fp32 is beyond its bound."""
    departs: str | None
    """Where the graph first leaves its model; looked for only when the logits do."""


@torch.no_grad()
def verify(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    precision: str = "fp32",
    provider: str = "auto",
    adapters: Mapping[str, Path] | None = None,
) -> VerifyReport:
    """Compare an exported folder with its model (fp32, on its device) on real prompts.

    adapters: peft folders of what was exported with them, by name; each is proven too, switched on.
    What cannot be read or run is a failed check. Raises ValueError when there is no model.onnx.
    """
    if not (folder / "model.onnx").is_file():
        raise no_model_in(folder)
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    proof, ran = None, at_most("runs", 0, 0, "all of it runs")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.fp32-", dir=folder.parent) as beside:
        try:
            proof = Proof(folder, Path(beside), model, rows, precision)
            proof.graph()
            session = Session(folder, provider=provider)
            provider = session.provider
            proof.runtime(session)
            proof.generation(session, new_tokens)
            del session
            for name, peft in (adapters or {}).items():
                proof.adapter(name, peft, provider)
            proof.faint()
        except UNREADABLE as error:
            what = f"{type(error).__name__}: {error}"
            says = f"{folder / 'model.onnx'} cannot be read or run to the end ({what})"
            ran = at_most("runs", float("nan"), 0, says)
    return _report(proof, ran, provider, len(rows))


def _report(proof: Proof | None, ran: Check, provider: str, prompts: int) -> VerifyReport:
    """proof: what was found up to where it ended; None: nothing was."""
    # Logits first: they tell most.
    checks = (*proof.checks, *proof.stored.checks, ran) if proof else (ran,)
    failures = [check.says for check in checks if not check.passed]
    if proof and proof.departs:
        failures.append(proof.departs)
    shipped = proof.shipped if proof else []
    off = distance(shipped)
    along = [pair for pair in shipped if pair[0].text == 0]
    by_position = {
        position: np.abs(rows.logits[i] - expected[i])
        for rows, expected in along
        for i, position in enumerate(rows.positions)
    }
    stepwise = distance(pair for pair in along if pair[0].how == "step by step")
    return VerifyReport(
        passed=not failures,
        checks=checks,
        failures=tuple(failures),
        provider=provider,
        logits_max_error=off.largest,
        logits_mean_error=off.mean,
        logits_relative_error=off.rms / proof.truth.spread if proof else float("nan"),
        greedy_same=proof.greedy_same if proof else 0,
        greedy_total=prompts,
        stepwise_max_error=stepwise.largest,
        batched_same=proof.batched_same if proof else False,
        positions=tuple(by_position),
        position_max_error=tuple(float(e.max()) for e in by_position.values()),
        position_mean_error=tuple(float(e.mean()) for e in by_position.values()),
        rounding=proof.rounding if proof else None,
        departs=proof.departs if proof else None,
    )
