"""What cells gave: a file that grows by one cell at a time, and means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atp_bench.environment import environment
from atp_bench.quality.cells import Cell
from atp_edge.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell gave, on the test split.

    recovery: dense over slim perplexity. tasks: slim over dense of every task, their mean as the
    paper takes it with its 95 % interval over items, and the mean above chance. block_losses: nats
    a token of every test block, by which two results are compared in pairs. seconds: of the
    training, from its last kill on. items: of every task, at most.
    """

    cell: Cell
    dense_perplexity: float
    perplexity_at_freeze: float
    perplexity: float
    recovery: float
    tasks: dict[str, Any]
    decoder_share: float
    whole_share: float
    tokens: int
    seconds: float
    items: int = 50
    block_losses: Sequence[float] = ()
    dense_block_losses: Sequence[float] = ()


def read_results(path: Path) -> dict[str, Result]:
    """Results by their cells' keys; none when there is no file."""
    rows = read_json(path).get("results", [])
    made = [Result(**row | {"cell": Cell(**row["cell"])}) for row in rows]
    return {result.cell.key: result for result in made}


def write_results(path: Path, found: Mapping[str, Result]) -> None:
    rows = [asdict(r) for r in found.values()]
    write_json(path, {"environment": environment(), "results": rows})


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of one method over seeds."""

    method: str
    domain: str
    share: float
    widths: str
    steps: int
    tokens: int
    seeds: int
    perplexity: float
    dense_perplexity: float
    recovery: float
    recovery_spread: tuple[float, float]
    """Lowest and highest of the seeds."""
    task_recovery: float
    whole_share: float


def summarize(results: Iterable[Result]) -> list[Summary]:
    """Means over seeds, best method first within a domain, share, widths and length."""
    groups: dict[tuple[str, float, str, int, str], list[Result]] = {}
    for r in results:
        c = r.cell
        groups.setdefault((c.domain, c.share, c.widths, c.steps, c.method), []).append(r)
    made = [
        Summary(
            method=method,
            domain=domain,
            share=share,
            widths=widths,
            steps=steps,
            tokens=rows[0].tokens,
            seeds=len(rows),
            perplexity=statistics.mean(r.perplexity for r in rows),
            dense_perplexity=statistics.mean(r.dense_perplexity for r in rows),
            recovery=statistics.mean(r.recovery for r in rows),
            recovery_spread=(min(r.recovery for r in rows), max(r.recovery for r in rows)),
            task_recovery=statistics.mean(r.tasks["average"] for r in rows),
            whole_share=statistics.mean(r.whole_share for r in rows),
        )
        for (domain, share, widths, steps, method), rows in groups.items()
    ]
    return sorted(made, key=lambda s: (s.domain, -s.share, s.widths, s.steps, -s.recovery))
