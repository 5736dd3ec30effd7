"""Tasks that any running text gives: which continuation, which clause, the next words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from atp_edge.data.documents import Document
from atp_edge.evaluation.distractors import CHOICES, near_texts, rarity_of
from atp_edge.evaluation.items import (
    ChoiceItem,
    Option,
    Task,
    TextItem,
    choice_task,
    in_turn,
    shuffled_options,
    text_task,
)

PROMPT_WORDS = 48

ANSWER_WORDS = 14

# Places taken from one document at most.
_PLACES = 8


# Passages of running text


@dataclass(frozen=True)
class _Passage:
    """A place in a document: the words before it, the words after it, the document's slice."""

    before: str
    after: str
    document: int
    slice: str


def passages_of(documents: Sequence[Document], draw: random.Random) -> list[_Passage]:
    """Places where a sentence begins, in turn over the documents, so that none outweighs others."""
    places: list[list[_Passage]] = []
    for number, document in enumerate(documents):
        plain = " ".join(re.sub(r"(?m)^[\s#*;/%|>.-]+", "", document.text).split())
        sentences = re.split(r"(?<=[.;:])\s+(?=[A-Z(\"0-9])", plain)
        found, before = [], ""
        for sentence in sentences:
            after = " ".join(sentence.split()[:ANSWER_WORDS])
            if len(before.split()) >= PROMPT_WORDS // 2 and len(after.split()) == ANSWER_WORDS:
                head = " ".join(before.split()[-PROMPT_WORDS:])
                found.append(_Passage(head, after, number, document.slice))
            before = f"{before} {sentence}".strip()
        draw.shuffle(found)
        places.append(found[:_PLACES])
    draw.shuffle(places)
    return in_turn(places)


def running_text_tasks(
    passages: Sequence[_Passage], fresh: Callable[[str], bool], items: int, seed: int
) -> list[Task]:
    """What any running text gives."""
    written = (item for item in map(_begun, passages) if fresh(item.reference))
    return [
        choice_task("continuation", _continuation(passages, fresh, seed), items, "calibrated"),
        choice_task("clause", _clause(passages, fresh, seed), items, "sum"),
        text_task("next-words", written, items),
    ]


def _begun(passage: _Passage) -> TextItem:
    """The rest of a sentence that has begun: which sentence comes next, nobody could know."""
    words = passage.after.split()
    begun, rest = words[: len(words) // 2], words[len(words) // 2 :]
    return TextItem(
        prompt=" ".join([passage.before, *begun]),
        reference=" ".join(rest),
        document=passage.document,
        slice=passage.slice,
    )


def _continuation(
    passages: Sequence[_Passage], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """Which passage goes on here? Distractors: passages of other documents of the same slice."""
    draw = random.Random(seed)
    rarity = rarity_of([p.after for p in passages])
    for passage in passages:
        others = [p for p in passages if p.document != passage.document]
        pools = ([p.after for p in others if p.slice == passage.slice], [p.after for p in others])
        near = near_texts(passage.after, pools, rarity)
        if len(near) == CHOICES - 1 and fresh(passage.after):
            options = [Option(prompt=passage.before, text=f" {t}") for t in [passage.after, *near]]
            yield shuffled_options(options, draw, document=passage.document, slice=passage.slice)


def _clause(
    passages: Sequence[_Passage], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """After which clause does this passage go on? Distractors: near clauses of other documents.

    One text is scored after every clause, so that no option gains by being likely in itself.
    """
    draw = random.Random(seed)
    rarity = rarity_of([p.before for p in passages])
    for passage in passages:
        others = [p for p in passages if p.document != passage.document]
        pools = ([p.before for p in others if p.slice == passage.slice], [p.before for p in others])
        near = near_texts(passage.before, pools, rarity)
        if len(near) == CHOICES - 1 and fresh(passage.after):
            options = [Option(prompt=t, text=f" {passage.after}") for t in [passage.before, *near]]
            yield shuffled_options(options, draw, document=passage.document, slice=passage.slice)
