"""Which items a model reads whole: the others are left out and counted, or refused by number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atp_edge.data.encoding import Encoder
from atp_edge.evaluation.items import NEW_TOKENS, ChoiceItem, Task, TextItem
from atp_edge.model.families import tokens_read


@dataclass(frozen=True)
class Fits:
    """What a window holds: the tokens that are read at once, of a prompt and of what follows it.
    None: everything."""

    encoder: Encoder
    window: int | None

    def rows(self, rows: Iterable[tuple[str, str]], new_tokens: int = 0) -> bool:
        """Whether every (context, continuation) fits, and so many new tokens after it."""
        if self.window is None:
            return True
        lengths = (sum(map(len, self.encoder.continued(*row))) for row in rows)
        return all(tokens_read(length + new_tokens) <= self.window for length in lengths)

    def item(self, item: ChoiceItem | TextItem) -> bool:
        """Whether all that a task asks of an item fits."""
        if isinstance(item, TextItem):
            return self.rows([(item.prompt, "")], NEW_TOKENS)
        return self.rows((p, o.text) for o in item.options for p in {o.prompt, o.null})

    def said(self, count: int, what: str) -> list[str]:
        """What is to be said of so many that were left out."""
        said = f"left out, longer than the {self.window} tokens that are read: {count} {what}"
        return [said] if count else []


def fitting(tasks: Sequence[Task], fits: Fits) -> tuple[list[Task], list[str]]:
    """The tasks with the items that fit, without those that no item is left of; and what is to be
    said of the others."""
    found = [_without_long(task, fits) for task in tasks]
    left_out = sum(len(task.items) for task in tasks) - sum(len(task.items) for task in found)
    return [task for task in found if task.items], fits.said(left_out, "items")


def _without_long(task: Task, fits: Fits) -> Task:
    items: Any = tuple(x for x in task.items if fits.item(x))
    return replace(task, items=items)


def check_fitting(tasks: Sequence[Task], fits: Fits) -> None:
    """Raises ValueError for the first item that does not fit."""
    for task in tasks:
        items: Sequence[ChoiceItem | TextItem] = task.items
        for number, item in enumerate(items, start=1):
            if not fits.item(item):
                raise ValueError(
                    f"task {task.name!r}, item {number}: longer than the {fits.window} tokens that "
                    "the model reads; shorten it, or leave it out"
                )
