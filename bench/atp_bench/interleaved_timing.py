"""Rivals measured in turns, round by round: what else the machine does falls on all of them.

Ratios are taken within a round (paired.py). One round before the others is not counted: it warms
up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from atp_edge.run.watched import counted

T = TypeVar("T")
Order = Callable[[Sequence[str], int], list[str]]
"""The names in the order of a round, from 0."""


def alternating(names: Sequence[str], index: int) -> list[str]:
    """Every other round backwards: nobody always runs after the same rival."""
    return list(reversed(names)) if index % 2 else list(names)


def rotating(names: Sequence[str], index: int) -> list[str]:
    """Each round starts with another name: everybody takes every place."""
    first = index % len(names)
    return [*names[first:], *names[:first]]


def interleaved_timing(
    runs: Mapping[str, Callable[[], T]], rounds: int, *, order: Order = alternating
) -> dict[str, list[T]]:
    """What every run gave in every round, by name; each runs once a round.

    Raises ValueError for less than one round.
    """
    return interleaved_rounds(
        runs, lambda names: {name: runs[name]() for name in names}, rounds, order=order
    )


def interleaved_rounds(
    names: Iterable[str],
    measure: Callable[[list[str]], Mapping[str, T]],
    rounds: int,
    *,
    order: Order = alternating,
    warm_up: Callable[[list[str]], Any] | None = None,
) -> dict[str, list[T]]:
    """As `interleaved_timing`, where one function measures a whole round: rivals may take turns
    within it too.

    measure: one round, of the names in this order. warm_up: the round that is not counted; by
    default one like the others. Raises ValueError for less than one round.
    """
    names = list(names)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: expected 1 or more")
    (warm_up or measure)(names)
    found: dict[str, list[T]] = {name: [] for name in names}
    for index in counted(range(rounds), "measuring rounds"):
        for name, one in measure(order(names, index)).items():
            found[name].append(one)
    return found
