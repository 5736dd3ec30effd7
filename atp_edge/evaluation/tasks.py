"""Tasks of a domain, built from the documents of the test split alone.

Multiple choice by likelihood and generation, in the shape of the tasks of ATP's paper (CaseHOLD,
MedNLI, PubMedQA; BillSum, HQS). Items follow from the seed. Distractors are near: passages of the
same kind of document that share the rare words of the answer, sibling codes. An item whose answer
occurs in a train document is left out.

Tried and dropped, at chance on the untuned 135M model: the licence category of a passage (0.24 of
0.25) and included or excluded terms (0.46 of 0.50).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal, TypeVar

from atp_edge.data.documents import Document
from atp_edge.data.domains import IcdEntry, health_entries

T = TypeVar("T")
Scoring = Literal["sum", "calibrated"]
PROMPT_WORDS = 48
ANSWER_WORDS = 14
CHOICES = 4
# Options of one item may not share a run of this many words: they would be one text.
_SHARED_RUN = 4
# Places taken from one document at most.
_PLACES = 8


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice: `text` scored after `prompt`; `null` is the same prompt told nothing."""

    prompt: str
    text: str
    null: str = ""


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A question whose options are compared by likelihood; `answer` is the right one's index."""

    options: tuple[Option, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class TextItem:
    """A prompt and the text that should follow it."""

    prompt: str
    reference: str


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


def domain_tasks(
    source: str,
    documents: Sequence[Document],
    *,
    train: Sequence[Document],
    items: int,
    seed: int,
) -> list[Task]:
    """The tasks of a built-in domain, or those that any text gives; `items` of each at most.

    documents: the test split; train: documents in which no answer may occur (both from
    `data.split_documents`). Raises ValueError when a task gets no item.
    """
    fresh = _unseen(train)
    if source == "health":
        families = _families(documents, random.Random(seed))
        tasks: list[Task] = [
            _choice("code", _code(families, fresh, seed), items, "sum"),
            _choice("notes", _notes_of_code(families, fresh, seed), items, "calibrated"),
            _text("description", _description(families, fresh), items),
        ]
    else:
        tasks = _text_tasks(_passages(documents, random.Random(seed)), fresh, items, seed)
    empty = [task.name for task in tasks if not task.items]
    if empty:
        raise ValueError(
            f"data {source!r}: the {len(documents)} test documents give no item for "
            f"{', '.join(empty)}; give more text or a larger --dataset-test-share"
        )
    return tasks


def _choice(name: str, made: Iterator[ChoiceItem], items: int, scoring: Scoring) -> ChoiceTask:
    return ChoiceTask(name=name, items=tuple(islice(made, items)), scoring=scoring)


def _text(name: str, made: Iterator[TextItem], items: int) -> TextTask:
    return TextTask(name=name, items=tuple(islice(made, items)))


@cache
def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _unseen(train: Sequence[Document]) -> Callable[[str], bool]:
    """Whether a text occurs in no train document, case and punctuation aside."""

    def plain(text: str) -> str:
        words = re.findall(r"\w+", text.lower())
        return f" {' '.join(words)} "

    known = "\n".join(plain(document.text) for document in train)
    return lambda text: plain(text) not in known


def _in_turn(rows: Sequence[Sequence[T]]) -> list[T]:
    """First elements of every row, then the second ones: no row outweighs the others."""
    return [row[i] for i in range(max(map(len, rows), default=0)) for row in rows if len(row) > i]


def _shuffled_options(options: list[Option], draw: random.Random) -> ChoiceItem:
    """The first option is the right one."""
    order = draw.sample(range(len(options)), len(options))
    return ChoiceItem(options=tuple(options[i] for i in order), answer=order.index(0))


# Near distractors


def _near(answer: str, pools: Sequence[Sequence[str]], rarity: dict[str, float]) -> list[str]:
    """Distractors: of the first pool, then of the next, those nearest to the answer in rare words.

    No two texts share a run of words, nor one with the answer.
    """
    taken = [answer]
    for pool in pools:
        for text in sorted(set(pool), key=lambda t: (-_closeness(answer, t, rarity), t)):
            if len(taken) < CHOICES and all(_distinct(text, other) for other in taken):
                taken.append(text)
    return taken[1:]


def _rarity(texts: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency of every word."""
    found = Counter(word for text in texts for word in set(_words(text)))
    return {word: math.log(len(texts) / count) for word, count in found.items()}


def _closeness(a: str, b: str, rarity: dict[str, float]) -> float:
    """Cosine of the two sets of words, weighed by rarity squared."""
    first, second = set(_words(a)), set(_words(b))

    def weight(words: set[str]) -> float:
        return sum(rarity.get(word, 0.0) ** 2 for word in words)

    return weight(first & second) / math.sqrt((weight(first) * weight(second)) or 1.0)


def _distinct(a: str, b: str) -> bool:
    runs = [set(_runs(_words(text))) for text in (a, b)]
    return not runs[0] & runs[1]


def _runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    size = min(_SHARED_RUN, len(words))
    yield from (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


# Passages of running text


@dataclass(frozen=True)
class _Passage:
    """A place in a document: the words before it, the words after it, the document's slice."""

    before: str
    after: str
    document: int
    slice: str


def _passages(documents: Sequence[Document], draw: random.Random) -> list[_Passage]:
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
    return _in_turn(places)


def _text_tasks(
    passages: Sequence[_Passage], fresh: Callable[[str], bool], items: int, seed: int
) -> list[Task]:
    """What any running text gives."""
    written = (item for item in map(_begun, passages) if fresh(item.reference))
    return [
        _choice("continuation", _continuation(passages, fresh, seed), items, "calibrated"),
        _choice("clause", _clause(passages, fresh, seed), items, "sum"),
        _text("next-words", written, items),
    ]


def _begun(passage: _Passage) -> TextItem:
    """The rest of a sentence that has begun: which sentence comes next, nobody could know."""
    words = passage.after.split()
    begun, rest = words[: len(words) // 2], words[len(words) // 2 :]
    return TextItem(prompt=" ".join([passage.before, *begun]), reference=" ".join(rest))


def _continuation(
    passages: Sequence[_Passage], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """Which passage goes on here? Distractors: passages of other documents of the same slice."""
    draw = random.Random(seed)
    rarity = _rarity([p.after for p in passages])
    for passage in passages:
        others = [p for p in passages if p.document != passage.document]
        pools = ([p.after for p in others if p.slice == passage.slice], [p.after for p in others])
        near = _near(passage.after, pools, rarity)
        if len(near) == CHOICES - 1 and fresh(passage.after):
            options = [Option(prompt=passage.before, text=f" {t}") for t in [passage.after, *near]]
            yield _shuffled_options(options, draw)


def _clause(
    passages: Sequence[_Passage], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """After which clause does this passage go on? Distractors: near clauses of other documents.

    One text is scored after every clause, so that no option gains by being likely in itself.
    """
    draw = random.Random(seed)
    rarity = _rarity([p.before for p in passages])
    for passage in passages:
        others = [p for p in passages if p.document != passage.document]
        pools = ([p.before for p in others if p.slice == passage.slice], [p.before for p in others])
        near = _near(passage.before, pools, rarity)
        if len(near) == CHOICES - 1 and fresh(passage.after):
            options = [Option(prompt=t, text=f" {passage.after}") for t in [passage.before, *near]]
            yield _shuffled_options(options, draw)


# ICD-10-CM


def _families(documents: Sequence[Document], draw: random.Random) -> list[list[IcdEntry]]:
    """The codes of every document: its category, and what is below."""
    families = [health_entries(document.text.split(maxsplit=1)[0]) for document in documents]
    draw.shuffle(families)
    return families


def _terms(terms: Sequence[str]) -> tuple[str, ...]:
    """Terms without the codes in brackets that stand behind them."""
    return tuple(re.sub(r"\s*\([A-Z]\d.*?\)", "", term).strip() for term in terms)


def _notes(entry: IcdEntry) -> str:
    return "; ".join(_terms(entry.belongs)[:3])


def _told_by_terms(
    families: Sequence[Sequence[IcdEntry]],
) -> list[tuple[IcdEntry, Sequence[IcdEntry]]]:
    """Codes with terms that no other code of the test has, with their families, in turn."""
    found = Counter(_notes(entry) for family in families for entry in family)
    return _in_turn([[(e, f) for e in f if e.belongs and found[_notes(e)] == 1] for f in families])


def _code(
    families: Sequence[Sequence[IcdEntry]], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """Which description fits these notes? Distractors: codes of the same category, else near ones.

    Scored as the text runs, description before notes: which description makes the notes likeliest.
    """
    draw = random.Random(seed)
    everything = [entry.description for family in families for entry in family]
    rarity = _rarity(everything)
    for entry, family in _told_by_terms(families):
        notes = _notes(entry)
        siblings = [e.description for e in family if not _related(e, entry)]
        family_too = {e.description for e in family}
        others = [text for text in everything if text not in family_too]
        near = _near(entry.description, (siblings, others), rarity)
        if len(near) == CHOICES - 1 and fresh(notes):
            options = [
                Option(prompt=f"{text}.\nAlso called:", text=f" {notes}.")
                for text in [entry.description, *near]
            ]
            yield _shuffled_options(options, draw)


def _related(a: IcdEntry, b: IcdEntry) -> bool:
    """Whether one code is the other or lies below it: both descriptions would then fit."""
    return a.code.startswith(b.code) or b.code.startswith(a.code)


def _notes_of_code(
    families: Sequence[Sequence[IcdEntry]], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """Which notes belong to this description? Distractors: notes of its family, else near ones."""
    draw = random.Random(seed)
    told = _told_by_terms(families)
    everything = [_notes(entry) for entry, _ in told]
    rarity = _rarity(everything)
    for entry, family in told:
        siblings = [_notes(e) for e in family if e.belongs and not _related(e, entry)]
        family_too = {_notes(e) for e in family}
        others = [text for text in everything if text not in family_too]
        near = _near(_notes(entry), (siblings, others), rarity)
        if len(near) == CHOICES - 1 and fresh(_notes(entry)):
            ask = "\nAlso called:"
            options = [
                Option(prompt=f"{entry.description}.{ask}", text=f" {text}.", null=ask)
                for text in [_notes(entry), *near]
            ]
            yield _shuffled_options(options, draw)


def _description(
    families: Sequence[Sequence[IcdEntry]], fresh: Callable[[str], bool]
) -> Iterator[TextItem]:
    """The description of a code from the terms that belong to it."""
    for entry, _ in _told_by_terms(families):
        if fresh(entry.description):
            prompt = f"Also called: {_notes(entry)}.\nName:"
            yield TextItem(prompt=prompt, reference=entry.description)
