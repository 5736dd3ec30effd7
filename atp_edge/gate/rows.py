"""Rows of the files that the gate is given: objects of known fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atp_edge.data.files import kind_of
from atp_edge.data.reader import check_characters
from atp_edge.data.rows import rows_of


def known_rows(path: Path, known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every row of a .jsonl or .json file, which may be compressed.

    Raises ValueError for what is no JSON object, for a field that is not known, for half a
    character, and for a file without any; OSError for one that cannot be read.
    """
    if kind_of(path) not in (".jsonl", ".json"):
        raise ValueError(f"{path}: expected .jsonl, a JSON object a line")
    empty = True
    for row in rows_of(path):
        empty = False
        if row.fault:
            raise ValueError(f"{row.place}: {row.fault}")
        if not isinstance(row.value, dict):
            raise ValueError(f"{row.place}: expected an object, found {type(row.value).__name__}")
        unknown = sorted(row.value.keys() - known)
        if unknown:
            raise ValueError(
                f"{row.place}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}"
            )
        try:  # What is read here is written into files and asked of tokenizers.
            check_characters(json.dumps(row.value, ensure_ascii=False))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        yield row.place, row.value
    if empty:
        raise ValueError(f"{path} is empty: expected a JSON object a line")
