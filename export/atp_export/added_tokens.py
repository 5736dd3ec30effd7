"""Added tokens of which it matters which is looked for first.

tokenizers looks for those of the text as it is, then for those of the normalized text, each time
from the left, the longest first. llama.cpp looks for the longest in the whole text, then for the
next; onnxruntime-genai for all at once, from the left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Token = dict[str, Any]


def overlapping(tokenizer: dict[str, Any]) -> Iterator[tuple[Token, Token]]:
    """Pairs of which the second begins inside the first and ends behind it; runs of one sign are
    the same in any order."""
    tokens = tokenizer["added_tokens"]
    beginning: dict[str, list[Token]] = {}
    for token in tokens:
        for n in range(1, len(token["content"])):
            beginning.setdefault(token["content"][:n], []).append(token)
    for first in tokens:
        text = first["content"]
        for n in range(1, len(text)):
            for second in beginning.get(text[-n:], ()):
                if second is not first and len({*text, *second["content"]}) > 1:
                    yield first, second


def inside(tokenizer: dict[str, Any]) -> Iterator[tuple[Token, Token]]:
    """Tokens of the normalized text, each with one that stands in it and is looked for before."""
    late = [token for token in tokenizer["added_tokens"] if token["normalized"]]
    early = [token for token in tokenizer["added_tokens"] if not token["normalized"]]
    for whole in late:
        for part in early:
            if part["content"] in whole["content"]:
                yield whole, part
