"""Items and tasks: multiple choice by likelihood, and generation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

T = TypeVar("T")

Scoring = Literal["sum", "calibrated"]
NEW_TOKENS = 20
"""Written after the prompt of a `TextItem`."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice: `text` scored after `prompt`; `null` is the same prompt told nothing."""

    prompt: str
    text: str
    null: str = ""


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A question whose options are compared by likelihood; `answer` is the right one's index.

    document, slice: what it was made of.
    """

    options: tuple[Option, ...]
    answer: int
    document: int = 0
    slice: str = "all"


@dataclass(frozen=True, kw_only=True)
class TextItem:
    """A prompt and the text that should follow it. document, slice: what it was made of."""

    prompt: str
    reference: str
    document: int = 0
    slice: str = "all"


@dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """Multiple choice by log-likelihood.

    scoring: as it is (sum), or what the prompt adds to it over `null`, a token (calibrated).
    """

    name: str
    items: tuple[ChoiceItem, ...]
    scoring: Scoring

    @property
    def chance(self) -> float:
        return sum(1 / len(item.options) for item in self.items) / len(self.items)


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Generation, compared with the reference by F1 and ROUGE."""

    name: str
    items: tuple[TextItem, ...]


Task = ChoiceTask | TextTask


def choice_task(name: str, made: Iterator[ChoiceItem], items: int, scoring: Scoring) -> ChoiceTask:
    return ChoiceTask(name=name, items=tuple(islice(made, items)), scoring=scoring)


def text_task(name: str, made: Iterator[TextItem], items: int) -> TextTask:
    return TextTask(name=name, items=tuple(islice(made, items)))


def in_turn(rows: Sequence[Sequence[T]]) -> list[T]:
    """First elements of every row, then the second ones: no row outweighs the others."""
    return [row[i] for i in range(max(map(len, rows), default=0)) for row in rows if len(row) > i]


def shuffled_options(
    options: list[Option], draw: random.Random, *, document: int, slice: str
) -> ChoiceItem:
    """The first option is the right one."""
    order = draw.sample(range(len(options)), len(options))
    return ChoiceItem(
        options=tuple(options[i] for i in order),
        answer=order.index(0),
        document=document,
        slice=slice,
    )
