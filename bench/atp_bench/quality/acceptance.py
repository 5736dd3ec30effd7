"""Acceptance: what atp-edge promises of its recovery, against what the cells gave.

Every promise is for SmolLM2-135M on the built-in domains. It is held only when its lowest value
holds it: a lucky seed shows nothing. Perplexity is taken cell by cell. Tasks are taken domain by
domain, over its seeds: each seed asks other items, too few to tell two models apart. Twins are
compared block by block on the test split; a lead whose interval holds zero is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import eq

from rich.table import Table

from atp_bench.quality.cells import IMPORTANCE
from atp_bench.quality.intervals import Measured, lead_over, mean_of_apart, recovery_of
from atp_bench.quality.results import Result

TWINS = ("frozen", "frozen, cut at once")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One promise: each of `measured` must reach `threshold`.

    above: it must lie above, as where a twin must be beaten; an interval that holds `threshold` is
    then a tie.
    """

    text: str
    threshold: float
    measured: tuple[Measured, ...]
    above: bool = False

    @property
    def lowest(self) -> Measured:
        return min(self.measured, key=lambda m: m.value)

    @property
    def verdict(self) -> str:
        """yes, no, tie, or not measured: the worst of what was measured."""
        if not self.measured:
            return "not measured"
        if not self.above:
            return "yes" if self.lowest.value >= self.threshold else "no"
        ends = [m.ends for m in self.measured]
        if any(high <= self.threshold for _, high in ends):
            return "no"
        return "yes" if all(low > self.threshold for low, _ in ends) else "tie"


def criteria(results: Sequence[Result]) -> list[Criterion]:
    """Every promise, with what the given results say of it."""

    def ours(share: float, tokens: int) -> list[Result]:
        wanted = ("atp", share, "per-layer", tokens, 0)
        return [
            r
            for r in results
            if (r.cell.method, r.cell.share, r.cell.widths, r.tokens, r.cell.documents) == wanted
        ]

    def promise(
        text: str, threshold: float, measured: Iterable[Measured], *, above: bool = False
    ) -> Criterion:
        return Criterion(text=text, threshold=threshold, measured=tuple(measured), above=above)

    main, fifth = ours(0.6, 102_400), ours(0.8, 102_400)
    short = "40 % cut, 0.1 M tokens: "

    def of_the_field(method: str) -> bool:
        return method.startswith("two-stage") and method != IMPORTANCE

    field = _leads(main, results, of_the_field)
    own = _leads(main, results, partial(eq, IMPORTANCE))
    return [
        promise(f"{short}recovery", 0.56, map(recovery_of, main)),
        promise("40 % cut, 0.2 M tokens: recovery", 0.62, map(recovery_of, ours(0.6, 204_800))),
        promise("40 % cut, 0.8 M tokens: recovery", 0.75, map(recovery_of, ours(0.6, 819_200))),
        promise("40 % cut, 20 M tokens: recovery", 0.85, map(recovery_of, ours(0.6, 20_971_520))),
        promise(f"{short}tasks", 0.91, _tasks(main)),
        promise("20 % cut, 0.1 M tokens: recovery", 0.80, map(recovery_of, fifth)),
        promise("20 % cut, 0.1 M tokens: tasks", 0.97, _tasks(fifth)),
        promise(f"{short}over the field's best two-stage way", 0.15, field),
        promise(f"{short}over two stages by our own importance", 0.15, own),
        *(
            promise(
                f"{short}over its twin, {twin}",
                0.0,
                _leads(main, results, partial(eq, twin)),
                above=True,
            )
            for twin in TWINS
        ),
    ]


def _tasks(results: Sequence[Result]) -> list[Measured]:
    """A domain's mean over its seeds; their items differ, so that intervals add in squares."""
    return [
        mean_of_apart([_task_average(r) for r in results if r.cell.domain == domain])
        for domain in dict.fromkeys(r.cell.domain for r in results)
    ]


def _task_average(result: Result) -> Measured:
    interval = result.tasks.get("interval")
    return Measured(value=result.tasks["average"], interval=interval and tuple(interval))


def _leads(
    ours: Iterable[Result], results: Sequence[Result], is_rival: Callable[[str], bool]
) -> list[Measured]:
    """Over the best rival on the same data, seed, budget, widths, steps and test blocks."""
    leads = []
    for result in ours:
        rivals = [r for r in results if is_rival(r.cell.method) and r.beside(result)]
        if rivals:
            leads.append(lead_over(result, max(rivals, key=lambda r: r.recovery)))
    return leads


def acceptance_table(made: Iterable[Criterion]) -> Table:
    """Asked, lowest (with its 95 % interval) and highest measured; 80 columns."""
    shown = Table(title="promised and measured", title_justify="left")
    shown.add_column("", overflow="fold")
    for name in ("asked", "lowest", "highest", "of", "held"):
        shown.add_column(name, justify="right")
    for criterion in made:
        text, threshold, lowest, interval, *rest = _row(criterion)
        shown.add_row(text, threshold, f"{lowest}\n{interval}".strip(), *rest)
    return shown


def acceptance_markdown(made: Iterable[Criterion]) -> str:
    """The same for a document."""
    head = (
        "| promise | asked | lowest | its 95 % interval | highest | of | held |\n"
        "|---|---:|---:|---:|---:|---:|---|\n"
    )
    return head + "".join(f"| {' | '.join(_row(criterion))} |\n" for criterion in made)


def _row(c: Criterion) -> tuple[str, ...]:
    threshold = f"{'>' if c.above else '≥'} {c.threshold:.2f}"
    if not c.measured:
        return c.text, threshold, "", "", "", "0", c.verdict
    highest = max(m.value for m in c.measured)
    return (c.text, threshold, f"{c.lowest.value:.3f}", c.lowest.interval_text, f"{highest:.3f}",
            str(len(c.measured)), c.verdict)  # fmt: skip
