"""Files written beside and renamed into place, so that nothing is ever half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside `path` and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, renamed into place when the block ends without an error."""
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one when there is no file."""
    loaded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file beside `path` and rename it into place."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def update_json(path: Path, section: str, value: Any) -> None:
    """Set one section of a JSON file and leave the others as they are."""
    write_json(path, read_json(path) | {section: value})
