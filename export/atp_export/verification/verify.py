"""Proof that an exported folder equals the PyTorch model it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from atp_export.runtime import Floats, Generation, Session, generate_tokens
from atp_export.verification.first_divergence import first_divergence
from atp_export.verification.float64_reference import Rounding, rounding

# fp32 must equal its model: the largest error of a logit, or one no worse than fp32's own rounding
# explains (`rounding`). Lower precisions round: their bound is on
# the error's root mean square over the logits' own spread; what that costs the test split measures.
FP32_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1, "int8": 0.1, "int4": 0.6}


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Errors of logits are absolute, over all prompts and positions."""

    passed: bool
    logits_max_error: float
    logits_mean_error: float
    logits_relative_error: float
    """Root mean square of the errors over the standard deviation of the logits."""
    greedy_same: int
    greedy_total: int
    stepwise_max_error: float
    """One token at a time against all at once, both on ONNX Runtime."""
    batched_same: bool
    """A ragged, padded batch generates what single rows do."""
    failures: tuple[str, ...]
    provider: str
    position_max_error: tuple[float, ...]
    position_mean_error: tuple[float, ...]
    """Both by position in the text, over all prompts and the vocabulary."""
    rounding: Rounding | None
    """Distances to the model in float64; measured only when fp32 logits differ by more than the
    tolerance."""
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
) -> VerifyReport:
    """Compare an exported folder with its model (fp32, on its device) on real prompts.

    Logits over prompt and continuation at every position, the same greedy tokens, the cache
    step by step, and a padded batch. Quantized exports need not choose the same tokens.
    """
    session = Session(folder, provider=provider)
    rows = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    theirs = [_greedy(model, row, new_tokens) for row in rows]
    ours = [generate_tokens(session, [row], max_new_tokens=new_tokens)[0] for row in rows]
    same = sum(a == b for a, b in zip(theirs, ours, strict=True))
    errors, spreads = [], []
    texts = [[*row, *new] for row, new in zip(rows, theirs, strict=True)]
    given = [_at_once(session, text) for text in texts]
    for text, logits in zip(texts, given, strict=True):
        expected = model(torch.tensor([text], device=_device(model))).logits[0].float().cpu()
        errors.append(np.abs(logits - expected.numpy()))
        spreads.append(float(expected.std()))
    whole = [*rows[0], *theirs[0]]
    stepwise = float(np.abs(_step_by_step(session, whole) - _at_once(session, whole)).max())
    ragged = [row[: len(row) - i % 5] or row for i, row in enumerate(rows[:4])]
    single = [generate_tokens(session, [row], max_new_tokens=16)[0] for row in ragged]
    batched = generate_tokens(session, ragged, max_new_tokens=16) == single
    worst = max(float(e.max()) for e in errors)
    relative = float(np.sqrt(np.mean([np.mean(e**2) for e in errors])) / np.mean(spreads))
    exact, bound = precision == "fp32", RELATIVE_TOLERANCE[precision]
    beyond = [i for i, e in enumerate(errors) if exact and float(e.max()) > FP32_TOLERANCE]
    own = rounding(model, [(texts[i], given[i]) for i in beyond]) if beyond else None
    by_position = _by_position(errors)
    checks = {
        f"logits differ by {worst:.2e}, more than {FP32_TOLERANCE:g} and than rounding explains "
        f"({own})": own is not None and not own.explains,
        f"logits differ by {relative:.2e} of their spread, more than {bound:g}": relative > bound,
        f"only {same} of {len(rows)} greedy continuations agree": exact and same < len(rows),
        f"step by step differs by {stepwise:.2e} from all at once": stepwise
        > (own.limit if own else FP32_TOLERANCE if exact else bound * np.mean(spreads) * 5),
        "a padded batch generates other tokens than single rows": exact and not batched,
    }
    failures = tuple(text for text, failed in checks.items() if failed)
    departs = None
    if any("logits differ" in failure for failure in failures):
        limit = max(bound, FP32_TOLERANCE)
        departs = first_divergence(folder, model, rows[0], provider=session.provider, bound=limit)
        failures += (departs,)
    return VerifyReport(
        passed=not failures,
        logits_max_error=worst,
        logits_mean_error=float(np.mean([e.mean() for e in errors])),
        logits_relative_error=relative,
        greedy_same=same,
        greedy_total=len(rows),
        stepwise_max_error=stepwise,
        batched_same=batched,
        failures=failures,
        provider=session.provider,
        position_max_error=tuple(float(at.max()) for at in by_position),
        position_mean_error=tuple(float(at.mean()) for at in by_position),
        rounding=own,
        departs=departs,
    )


def _by_position(errors: Sequence[Floats]) -> list[Floats]:
    """Per position, the errors [texts, V] of all texts that reach it."""
    longest = max(map(len, errors))
    return [np.stack([e[t] for e in errors if t < len(e)]) for t in range(longest)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _greedy(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens by transformers' own generate, never stopping early."""
    prompt = torch.tensor([ids], device=_device(model))
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(out[0, len(ids) :].tolist())


def _at_once(session: Session, ids: list[int]) -> Floats:
    logits: Floats = Generation(session, 1, len(ids)).step(np.array([ids], np.int64))[0]
    return logits


def _step_by_step(session: Session, ids: list[int]) -> Floats:
    state = Generation(session, 1, len(ids))
    steps = [state.step(np.array([[token]], np.int64))[0] for token in ids]
    return np.concatenate(steps)
