"""Means over seeds, method by method, and what ATP leads each of them by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from atp_bench.quality.cells import Cell
from atp_bench.quality.intervals import Measured, lead_over, mean_of_apart, recovery_of
from atp_bench.quality.results import Result


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of one method over seeds."""

    method: str
    where: str
    domain: str
    share: float
    widths: str
    tokens: int
    documents: float
    """Of the train split; infinite: all."""
    seeds: int
    perplexity: float
    dense_perplexity: float
    recovery: Measured
    recovery_spread: tuple[float, float]
    """Lowest and highest of the seeds."""
    lead: Measured | None
    """Recovery of ATP less this one's, seed by seed; None where no ATP was measured beside it."""
    task_recovery: float
    whole_share: float


def summarize(results: Iterable[Result]) -> list[Summary]:
    """Means over seeds, best method first within a domain, share, widths, length and documents."""
    groups: dict[Cell, list[Result]] = {}
    results = list(results)
    ours = [r for r in results if r.cell.method == "atp"]
    for r in results:
        groups.setdefault(replace(r.cell, seed=0), []).append(r)
    made = [
        Summary(
            method=cell.method,
            where=rows[0].where,
            domain=cell.domain,
            share=cell.share,
            widths=cell.widths,
            tokens=rows[0].tokens,
            documents=cell.documents or math.inf,
            seeds=len(rows),
            perplexity=statistics.mean(r.perplexity for r in rows),
            dense_perplexity=statistics.mean(r.dense_perplexity for r in rows),
            recovery=mean_of_apart([recovery_of(r) for r in rows]),
            recovery_spread=(min(r.recovery for r in rows), max(r.recovery for r in rows)),
            lead=_lead(ours, rows),
            task_recovery=statistics.mean(r.tasks["average"] for r in rows),
            whole_share=statistics.mean(r.whole_share for r in rows),
        )
        for cell, rows in groups.items()
    ]
    return sorted(
        made,
        key=lambda s: (
            s.domain, -s.share, s.widths, s.tokens, s.documents, s.where, -s.recovery.value,
        ),
    )  # fmt: skip


def _lead(ours: list[Result], rows: list[Result]) -> Measured | None:
    leads = [lead_over(a, r) for r in rows for a in ours if a is not r and a.beside(r)]
    return mean_of_apart(leads) if leads else None


def lead_cells(s: Summary) -> tuple[str, str]:
    """What ATP leads by and its interval, as a table shows them."""
    return (f"{s.lead.value:z.3f}", s.lead.interval_text) if s.lead else ("", "")
