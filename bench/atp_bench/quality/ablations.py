"""What each part of the method buys: ATP beside itself with that one part changed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from atp_bench.quality.cells import ABLATIONS
from atp_bench.quality.measured import Measured, lead_over, mean_of_apart
from atp_bench.quality.results import Result


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One part changed, over the seeds of a domain, budget, widths and length.

    lead: recovery of ATP as it is less this one's, seed by seed.
    """

    part: str
    where: str
    seeds: int
    recovery: float
    tasks: float
    lead: Measured


def ablations(results: Sequence[Result]) -> list[Ablation]:
    """Every ablation that has its ATP twin among the results; what buys most comes first."""
    whole = [r for r in results if r.cell.method == "atp"]
    groups: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for r in results:
        ours = next(filter(r.beside, whole), None)
        if r.cell.method in ABLATIONS and ours is not None:
            groups.setdefault((r.where, r.cell.method), []).append((ours, r))
    made = [
        Ablation(
            part=part,
            where=where,
            seeds=len(pairs),
            recovery=statistics.mean(changed.recovery for _, changed in pairs),
            tasks=statistics.mean(changed.tasks["average"] for _, changed in pairs),
            lead=mean_of_apart([lead_over(*pair) for pair in pairs]),
        )
        for (where, part), pairs in groups.items()
    ]
    return sorted(made, key=lambda a: (a.where, -a.lead.value))


def ablations_tables(made: Iterable[Ablation]) -> Iterator[Table]:
    """A table where something was measured, one row a changed part, at 80 columns."""
    for where, rows in itertools.groupby(made, key=lambda a: a.where):
        shown = Table(title=f"ATP with one part changed: {where}", title_justify="left")
        shown.add_column("changed", overflow="fold")
        for name in ("seeds", "recovery", "tasks", "the default leads by"):
            shown.add_column(name, justify="right")
        for a in rows:
            *cells, lead, interval = _row(a)
            shown.add_row(*cells, f"{lead}\n{interval}".strip())
        yield shown


def ablations_markdown(made: Iterable[Ablation]) -> str:
    """The same for a document."""
    head = (
        "| changed | seeds | recovery | tasks | the default leads by | its 95 % interval |\n"
        "|---|---:|---:|---:|---:|---:|\n"
    )
    parts = []
    for where, rows in itertools.groupby(made, key=lambda a: a.where):
        lines = (f"| {' | '.join(_row(a))} |\n" for a in rows)
        parts += [f"{where[0].upper()}{where[1:]}:\n\n", head, *lines, "\n"]
    return "".join(parts)


def _row(a: Ablation) -> tuple[str, ...]:
    return (a.part, str(a.seeds), f"{a.recovery:.3f}", f"{a.tasks:.3f}",
            f"{a.lead.value:.3f}", a.lead.interval_text)  # fmt: skip
