"""Rows of the files that the gate is given: objects of known fields, a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def jsonl_rows(path: Path, known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line. Raises ValueError for what is no JSON object, for a field that
    is not known, and for a file without any; OSError for one that cannot be read."""
    count = 0
    try:
        # U+2028 ends no line: it may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, found {type(row).__name__}")
        unknown = sorted(set(row) - known)
        if unknown:
            raise ValueError(
                f"{place}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}"
            )
        count += 1
        yield place, row
    if not count:
        raise ValueError(f"{path} is empty: expected a JSON object a line")
