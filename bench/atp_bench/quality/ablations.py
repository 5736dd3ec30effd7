"""What each part of the method buys: ATP beside itself with that one part changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from operator import itemgetter

from rich.table import Table

from atp_bench.quality.cells import ABLATIONS
from atp_bench.quality.summary import Summary, lead_cells


def ablations(summaries: Iterable[Summary]) -> list[Summary]:
    """Every ablation that was measured beside ATP; what buys most comes first."""
    led = [(s.where, -s.lead.value, s) for s in summaries if s.method in ABLATIONS and s.lead]
    return [s for *_, s in sorted(led, key=itemgetter(0, 1))]


def ablations_tables(made: Iterable[Summary]) -> Iterator[Table]:
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


def ablations_markdown(made: Iterable[Summary]) -> str:
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


def _row(s: Summary) -> tuple[str, ...]:
    return (s.method, str(s.seeds), f"{s.recovery.value:.3f}", f"{s.task_recovery:.3f}",
            *lead_cells(s))  # fmt: skip
