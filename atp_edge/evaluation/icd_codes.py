"""Tasks of ICD-10-CM: which code, which notes, its description from its terms."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atp_edge.data.documents import Document
from atp_edge.data.domains import IcdEntry, health_entries
from atp_edge.evaluation.distractors import CHOICES, near_texts, rarity_of
from atp_edge.evaluation.items import ChoiceItem, Option, TextItem, in_turn, shuffled_options

# ICD-10-CM


def families_of(documents: Sequence[Document], draw: random.Random) -> list[list[IcdEntry]]:
    """The codes of every document: its category, and what is below."""
    families = [health_entries(document.text.split(maxsplit=1)[0]) for document in documents]
    draw.shuffle(families)
    return families


def _place(family: Sequence[IcdEntry], families: Sequence[Sequence[IcdEntry]]) -> dict[str, Any]:
    """An item's document, the number of its family, and its slice, the letter of its codes."""
    code = family[0].code
    number = next(i for i, other in enumerate(families) if other[0].code == code)
    return {"document": number, "slice": code[0]}


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
    return in_turn([[(e, f) for e in f if e.belongs and found[_notes(e)] == 1] for f in families])


def which_code(
    families: Sequence[Sequence[IcdEntry]], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """Which description fits these notes? Distractors: codes of the same category, else near ones.

    Scored as the text runs, description before notes: which description makes the notes likeliest.
    """
    draw = random.Random(seed)
    everything = [entry.description for family in families for entry in family]
    rarity = rarity_of(everything)
    for entry, family in _told_by_terms(families):
        notes = _notes(entry)
        siblings = [e.description for e in family if not _related(e, entry)]
        family_too = {e.description for e in family}
        others = [text for text in everything if text not in family_too]
        near = near_texts(entry.description, (siblings, others), rarity)
        if len(near) == CHOICES - 1 and fresh(notes):
            options = [
                Option(prompt=f"{text}.\nAlso called:", text=f" {notes}.")
                for text in [entry.description, *near]
            ]
            yield shuffled_options(options, draw, **_place(family, families))


def _related(a: IcdEntry, b: IcdEntry) -> bool:
    """Whether one code is the other or lies below it: both descriptions would then fit."""
    return a.code.startswith(b.code) or b.code.startswith(a.code)


def which_notes(
    families: Sequence[Sequence[IcdEntry]], fresh: Callable[[str], bool], seed: int
) -> Iterator[ChoiceItem]:
    """Which notes belong to this description? Distractors: notes of its family, else near ones."""
    draw = random.Random(seed)
    told = _told_by_terms(families)
    everything = [_notes(entry) for entry, _ in told]
    rarity = rarity_of(everything)
    for entry, family in told:
        siblings = [_notes(e) for e in family if e.belongs and not _related(e, entry)]
        family_too = {_notes(e) for e in family}
        others = [text for text in everything if text not in family_too]
        near = near_texts(_notes(entry), (siblings, others), rarity)
        if len(near) == CHOICES - 1 and fresh(_notes(entry)):
            ask = "\nAlso called:"
            options = [
                Option(prompt=f"{entry.description}.{ask}", text=f" {text}.", null=ask)
                for text in [_notes(entry), *near]
            ]
            yield shuffled_options(options, draw, **_place(family, families))


def descriptions(
    families: Sequence[Sequence[IcdEntry]], fresh: Callable[[str], bool]
) -> Iterator[TextItem]:
    """The description of a code from the terms that belong to it."""
    for entry, family in _told_by_terms(families):
        if fresh(entry.description):
            prompt = f"Also called: {_notes(entry)}.\nName:"
            place = _place(family, families)
            yield TextItem(prompt=prompt, reference=entry.description, **place)
