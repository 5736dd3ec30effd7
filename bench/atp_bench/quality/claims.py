"""What atp-edge promises of its recovery, against what the cells gave.

Every promise is for SmolLM2-135M on the built-in domains, and is held only when its lowest cell
holds it: a lucky seed shows nothing. Twins are compared block by block on the test split, and a
lead whose interval holds zero is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import eq

import numpy as np
from rich.table import Table

from atp_bench.quality.results import Result
from atp_edge.evaluate import middle, resampled

TWINS = ("frozen", "frozen, cut at once")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One promise: `measured` holds one value a cell, and each must reach `asked`.

    above: `asked` itself is not enough, as where a twin must be beaten; then `intervals` are of
    every value, and one that holds `asked` is a tie.
    """

    text: str
    asked: float
    measured: tuple[float, ...]
    above: bool = False
    intervals: tuple[tuple[float, float], ...] = ()

    @property
    def verdict(self) -> str:
        """yes, no, tie, or not measured: the worst of its cells."""
        if not self.measured:
            return "not measured"
        if not self.above:
            return "yes" if min(self.measured) >= self.asked else "no"
        if any(high <= self.asked for _, high in self.intervals):
            return "no"
        return "yes" if all(low > self.asked for low, _ in self.intervals) else "tie"


@dataclass(frozen=True, kw_only=True)
class Lead:
    """Recovery less a rival's, and its 95 % interval over the test blocks (both answered all)."""

    value: float
    interval: tuple[float, float]


def claims(results: Sequence[Result]) -> list[Claim]:
    """Every promise, with what the given results say of it."""

    def ours(share: float, steps: int) -> list[Result]:
        wanted = ("atp", share, "per-layer", steps)
        return [
            r
            for r in results
            if (r.cell.method, r.cell.share, r.cell.widths, r.cell.steps) == wanted
        ]

    main = ours(0.6, 200)
    short = "40 % cut, 0.1 M tokens: "
    return [
        _reached(f"{short}recovery", 0.56, main, _recovery),
        _reached("40 % cut, 0.2 M tokens: recovery", 0.62, ours(0.6, 400), _recovery),
        _reached("40 % cut, 0.8 M tokens: recovery", 0.75, ours(0.6, 1600), _recovery),
        _reached(f"{short}tasks", 0.91, main, _tasks),
        _reached("20 % cut, 0.1 M tokens: recovery", 0.80, ours(0.8, 200), _recovery),
        _reached("20 % cut, 0.1 M tokens: tasks", 0.97, ours(0.8, 200), _tasks),
        _beaten(
            f"{short}over the best two-stage way",
            0.15,
            _leads(main, results, lambda method: method.startswith("two-stage")),
        ),
        *(
            _beaten(
                f"{short}over its twin, {twin}",
                0.0,
                _leads(main, results, partial(eq, twin)),
                above=True,
            )
            for twin in TWINS
        ),
    ]


def _reached(
    text: str, asked: float, results: Iterable[Result], value: Callable[[Result], float]
) -> Claim:
    return Claim(text=text, asked=asked, measured=tuple(value(r) for r in results))


def _beaten(text: str, asked: float, leads: list[Lead], *, above: bool = False) -> Claim:
    return Claim(
        text=text,
        asked=asked,
        measured=tuple(lead.value for lead in leads),
        above=above,
        intervals=tuple(lead.interval for lead in leads),
    )


def _recovery(result: Result) -> float:
    return result.recovery


def _tasks(result: Result) -> float:
    return float(result.tasks["average"])


def _leads(
    ours: Iterable[Result], results: Sequence[Result], is_rival: Callable[[str], bool]
) -> list[Lead]:
    """Over the best rival on the same data, seed, budget, widths and steps."""
    leads = []
    for result in ours:
        rivals = [
            r
            for r in results
            if is_rival(r.cell.method) and replace(r.cell, method="atp") == result.cell
        ]
        if rivals:
            leads.append(_lead(result, max(rivals, key=_recovery)))
    return leads


def _lead(ours: Result, rival: Result) -> Lead:
    value = ours.recovery - rival.recovery
    if not (ours.block_losses and rival.block_losses):
        return Lead(value=value, interval=(value, value))
    drawn = resampled(len(ours.block_losses))
    dense, slim, other = (
        np.array(losses)[drawn].mean(axis=1)
        for losses in (ours.dense_block_losses, ours.block_losses, rival.block_losses)
    )
    return Lead(value=value, interval=middle(np.exp(dense - slim) - np.exp(dense - other)))


def claims_table(made: Iterable[Claim]) -> Table:
    """Asked, lowest and highest measured; 80 columns."""
    shown = Table(title="promised and measured", title_justify="left")
    shown.add_column("", overflow="fold")
    for name in ("asked", "lowest", "highest", "cells", "held"):
        shown.add_column(name, justify="right", no_wrap=True)
    for claim in made:
        shown.add_row(*_row(claim))
    return shown


def claims_markdown(made: Iterable[Claim]) -> str:
    head = "| promise | asked | lowest | highest | cells | held |\n|---|---:|---:|---:|---:|---|\n"
    return head + "".join(f"| {' | '.join(_row(claim))} |\n" for claim in made)


def _row(claim: Claim) -> tuple[str, ...]:
    asked = f"{'>' if claim.above else '≥'} {claim.asked:.2f}"
    if not claim.measured:
        return claim.text, asked, "", "", "0", claim.verdict
    lowest, highest = min(claim.measured), max(claim.measured)
    cells = str(len(claim.measured))
    return claim.text, asked, f"{lowest:.3f}", f"{highest:.3f}", cells, claim.verdict
