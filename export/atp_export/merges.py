"""Whether the merges of a byte-level BPE vocabulary make its words, each part before the whole."""

from __future__ import annotations

from typing import Any

from atp_export.byte_letters import LETTERS
from atp_export.put_around import added_ids


def made_in_order(tokenizer: dict[str, Any]) -> bool:
    """Of the contents of a tokenizer.json. Where words that are tokens are taken whole, whatever
    merges say, only what merges make has to be made in order."""
    model, added = tokenizer["model"], added_ids(tokenizer)
    made = set(LETTERS)
    for first, second in model["merges"]:
        if first in made and second in made:
            made.add(first + second)
    if model["ignore_merges"]:
        words = {first + second for first, second in model["merges"]}
    else:
        words = {word for word in model["vocab"] if not (word in added and word.isascii())}
    return all(word in made for word in words if set(word) <= LETTERS.keys())
