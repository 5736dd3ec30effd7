"""The letters by which a byte-level vocabulary writes bytes, and those that it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def _letters() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = _letters()
"""The byte that each stands for."""
CONTROLS = {*range(0x20), 0x7F} - set(b"\t\n\r")
"""Bytes that are characters of their own, which no one reads."""
_NO_CHARACTER = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
"""Bytes that UTF-8 has no use for, or that begin U+40000 to U+BFFFF, which are not assigned."""


def without_token(tokenizer: dict[str, Any]) -> list[int]:
    """Bytes of characters for which the vocabulary of a tokenizer.json has no letter."""
    vocabulary = tokenizer["model"]["vocab"]
    lacking = {byte for letter, byte in LETTERS.items() if letter not in vocabulary}
    return sorted(lacking - _NO_CHARACTER)


def code_points(values: Iterable[int]) -> str:
    return ", ".join(f"U+{value:04X}" for value in values)
