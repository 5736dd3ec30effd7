"""Who runs when: the order of the rounds, and the round that is not counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from atp_bench.interleaved_timing import (
    Order,
    alternating,
    interleaved_rounds,
    interleaved_timing,
    rotating,
)
from atp_bench.paired import paired_ratio, ratios

FORWARD, BACKWARD = ["a", "b", "c"], ["c", "b", "a"]


def counted(calls: list[str]) -> dict[str, Callable[[], int]]:
    """Runs that note their names, and give how many calls there were before."""

    def run(name: str) -> int:
        calls.append(name)
        return len(calls) - 1

    return {name: lambda name=name: run(name) for name in FORWARD}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("order", "rounds"),
    [
        (alternating, [FORWARD, FORWARD, BACKWARD, FORWARD]),
        (rotating, [FORWARD, FORWARD, ["b", "c", "a"], ["c", "a", "b"]]),
    ],
)
def test_all_run_once_a_round_in_its_order_and_the_first_round_is_not_counted(
    order: Order, rounds: list[list[str]]
) -> None:
    calls: list[str] = []
    found = interleaved_timing(counted(calls), 3, order=order)
    assert calls == [name for names in rounds for name in names]
    places = {n: [3 * i + names.index(n) for i, names in enumerate(rounds)] for n in FORWARD}
    assert found == {name: calls_of[1:] for name, calls_of in places.items()}


def test_the_names_of_the_first_round_give_the_order_of_what_is_found() -> None:
    assert list(interleaved_timing(counted([]), 2)) == FORWARD


def test_a_warm_up_of_its_own_stands_for_the_first_round() -> None:
    seen: list[tuple[str, list[str]]] = []

    def measure(names: list[str]) -> dict[str, int]:
        seen.append(("round", names))
        return dict.fromkeys(names, len(seen))

    found = interleaved_rounds(FORWARD, measure, 2, warm_up=lambda n: seen.append(("warm-up", n)))
    assert seen == [("warm-up", FORWARD), ("round", FORWARD), ("round", BACKWARD)]
    assert found == {name: [2, 3] for name in FORWARD}


def test_no_rounds_are_refused_before_anything_runs() -> None:
    calls: list[str] = []
    with pytest.raises(ValueError, match="rounds is 0: expected 1 or more"):
        interleaved_timing(counted(calls), 0)
    assert not calls


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert paired_ratio([1.0, 2.0, 30.0], [1.0, 1.0, 10.0]).median == 2.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratios([1.0, 2.0], [1.0])
