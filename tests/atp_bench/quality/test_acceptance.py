"""What is promised: held by the lowest value, against rivals of the same data and seed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from atp_bench.quality.acceptance import Criterion, criteria
from atp_bench.quality.cells import IMPORTANCE
from atp_bench.quality.intervals import lead_over
from atp_bench.quality.results import Result

from tests.atp_bench.quality.example import results


def promise(results: list[Result], ending: str) -> Criterion:
    return next(c for c in criteria(results) if c.text.endswith(ending))


def values(found: Criterion) -> tuple[float, ...]:
    return tuple(m.value for m in found.measured)


def test_a_promise_is_held_by_its_lowest_cell_or_not_at_all() -> None:
    found = results()
    assert values(promise(found, "0.1 M tokens: recovery")) == (0.6, 0.5)
    assert promise(found, "0.1 M tokens: recovery").verdict == "no"
    assert promise(found[:1], "0.1 M tokens: recovery").verdict == "yes"
    assert promise(found, "0.8 M tokens: recovery").verdict == "not measured"


def test_a_rival_is_compared_on_its_own_data_and_seed_alone() -> None:
    lead = promise(results(), "two-stage way")
    assert values(lead) == pytest.approx((0.2,))
    assert lead.verdict == "yes"
    by_ours = [replace(r, cell=replace(r.cell, method=IMPORTANCE)) for r in results()[:1]]
    assert promise(results() + by_ours, "two-stage way") == lead, "our own score is not the field's"
    assert values(promise(results() + by_ours, "our own importance")) == (0.0,)
    twin = [replace(r, cell=replace(r.cell, method="frozen")) for r in results()[:2]]
    assert values(promise(results() + twin, "twin, frozen")) == (0.0, 0.0)
    assert promise(results() + twin, "twin, frozen").verdict == "no", "a twin must be beaten"


@pytest.mark.parametrize(
    ("rival_losses", "verdict"),
    [
        ((3.02, 3.13, 3.22, 3.35), "yes"),  # worse in every block
        ((2.9, 3.2, 3.1, 3.24), "tie"),  # worse here, better there
        ((2.98, 3.07, 3.18, 3.25), "no"),
    ],
)
def test_twins_are_compared_block_by_block(rival_losses: tuple[float, ...], verdict: str) -> None:
    def with_losses(result: Result, losses: tuple[float, ...]) -> Result:
        mean = sum(losses) / 4
        return replace(
            result,
            dense_perplexity=math.exp(2.5),
            perplexity=math.exp(mean),
            recovery=math.exp(2.5 - mean),
            block_losses=losses,
            dense_block_losses=(2.5, 2.4, 2.6, 2.5),
        )

    ours = with_losses(results()[0], (3.0, 3.1, 3.2, 3.3))
    twin = with_losses(replace(ours, cell=replace(ours.cell, method="frozen")), rival_losses)
    lead = promise([ours, twin], "twin, frozen")
    (measured,) = lead.measured
    assert measured.interval
    assert measured.interval[0] <= measured.value <= measured.interval[1]
    assert lead.verdict == verdict
    beside_a_better_dense = replace(twin, dense_perplexity=math.exp(2.4), recovery=math.exp(-0.7))
    assert lead_over(ours, beside_a_better_dense) == lead_over(ours, twin)


def test_tasks_are_judged_over_the_seeds_of_a_domain() -> None:
    first, second = results()[:2]

    def scored(result: Result, average: float, domain: str = "legal") -> Result:
        tasks = {"average": average, "interval": [average - 0.08, average + 0.06]}
        return replace(result, cell=replace(result.cell, domain=domain), tasks=tasks)

    seeds = [scored(first, 0.88), scored(second, 0.96)]
    legal, health = promise([*seeds, scored(first, 0.95, "health")], "0.1 M tokens: tasks").measured
    assert (legal.value, health.value) == pytest.approx((0.92, 0.95))
    assert legal.interval == pytest.approx((0.92 - 0.08 / 2**0.5, 0.92 + 0.06 / 2**0.5))
    assert promise(seeds, "0.1 M tokens: tasks").verdict == "yes"
    assert promise(seeds[:1], "0.1 M tokens: tasks").verdict == "no"
