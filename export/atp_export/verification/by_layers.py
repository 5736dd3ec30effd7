"""A proof of a model that memory does not hold: some layers at a time, all of them in the end.

Each excerpt (embedding, some layers, head) is proven as a model is: its tensors, its graph in fp32,
what ships of it, its tokens. Nothing asks for what the whole model answers: layers are alike, and
what leaves one enters the next.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atp_export.verification.excerpt import excerpt_graph, excerpt_model
from atp_export.verification.verify import VerifyReport, verify


def verify_by_layers(
    folder: Path,
    checkpoint: Path,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    layers: int,
    at_once: int,
    new_tokens: int = 64,
    precision: str = "fp32",
    provider: str = "auto",
) -> VerifyReport:
    """As `verify`, of a folder with so many layers against its checkpoint, `at_once` at a time."""
    reports: dict[str, VerifyReport] = {}
    for first in range(0, layers, at_once):
        some = range(first, min(first + at_once, layers))
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.part-", dir=folder.parent) as part:
            excerpt = excerpt_graph(folder, Path(part) / "onnx", some)
            reports[f"layers {some.start} to {some.stop - 1}"] = verify(
                excerpt,
                excerpt_model(checkpoint, some),
                tokenizer,
                prompts,
                new_tokens=new_tokens,
                precision=precision,
                provider=provider,
            )
    return together(reports)


def together(reports: dict[str, VerifyReport]) -> VerifyReport:
    """One report: every check, by the layers it is of; the figures of the excerpt that is furthest
    from PyTorch, and the tokens of all."""
    every = list(reports.values())
    worst = max(every, key=lambda report: report.logits_relative_error)
    return replace(
        worst,
        passed=all(report.passed for report in every),
        checks=tuple(
            replace(check, name=f"{name}: {check.name}", says=f"{name}: {check.says}")
            for name, report in reports.items()
            for check in report.checks
        ),
        failures=tuple(f"{name}: {says}" for name, r in reports.items() for says in r.failures),
        logits_max_error=max(report.logits_max_error for report in every),
        stepwise_max_error=max(report.stepwise_max_error for report in every),
        greedy_same=sum(report.greedy_same for report in every),
        greedy_total=sum(report.greedy_total for report in every),
        batched_same=all(report.batched_same for report in every),
    )
