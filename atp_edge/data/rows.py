"""Rows of a file or folder, each with its place; what a row holds is told by its forms."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_edge.data.files import kind_of, lines_of, text_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row, and where it stands; `fault` where it could not be parsed and others can."""

    place: str
    value: Any = None
    fault: str = ""


def rows_of(path: Path) -> Iterator[Row]:
    """Rows of a file, or of the files of a folder.

    Raises ValueError or OSError, naming file and place, for what makes all of it unreadable.
    """
    if path.is_dir():
        return _of_folder(path)
    read = _READERS.get(kind_of(path))
    if read is None:
        raise ValueError(
            f"data {path}: unknown kind {path.suffix!r}; expected {', '.join(_READERS)}, the text "
            "among them also as .gz or .zst, or a folder of such"
        )
    return read(path)


def _of_folder(path: Path) -> Iterator[Row]:
    """What `datasets` saved; else every file of a known kind in order, or, where names or folders
    begin with `train`, those alone."""
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from _of_datasets(path)
        return
    found = {file: file.relative_to(path).parts for file in sorted(path.rglob("*"))}
    files = [
        file
        for file, parts in found.items()
        if file.is_file()
        and kind_of(file) in _READERS
        and file.name.lower() != "readme.md"
        and not any(part.startswith(".") for part in parts)
    ]
    if not files:
        raise ValueError(f"data {path}: no file in this folder is {', '.join(_READERS)}")
    train = [f for f in files if any(part.lower().startswith("train") for part in found[f])]
    for file in train or files:
        yield from _READERS[kind_of(file)](file)


# JSON


def _of_json(path: Path) -> Iterator[Row]:
    """An array of rows, or one row a line; in .json also one object over several lines."""
    start = next((line for line in lines_of(path) if line.text.strip() or line.fault), None)
    if start is None:
        return
    if start.text.lstrip().startswith("["):
        yield from _of_array(path)
        return
    if kind_of(path) == ".json" and "fault" in _parsed(start.text):
        whole = _parsed(text_of(path))
        if "value" in whole:
            yield Row(place=f"{path}, line {start.number}", **whole)
            return
    for line in lines_of(path):
        if line.text.strip() or line.fault:
            parsed = {"fault": line.fault} if line.fault else _parsed(line.text)
            yield Row(place=f"{path}, line {line.number}", **parsed)


def _parsed(text: str) -> dict[str, Any]:
    """The `value` of JSON, or the `fault` in it."""
    try:
        return {"value": json.loads(text, object_pairs_hook=_once)}
    except (ValueError, RecursionError) as error:
        return {"fault": f"not JSON ({_reason(error)}); expected one object a line"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError for a key that it has twice: which is meant, nobody knows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _of_array(path: Path) -> Iterator[Row]:
    """Elements one by one, for the line of each."""
    text, decoder = text_of(path), json.JSONDecoder(object_pairs_hook=_once)
    at = _after_space(text, text.index("[") + 1)
    line, counted = 1, 0
    ended = text[at : at + 1] == "]"
    while not ended:
        line, counted = line + text.count("\n", counted, at), at
        place = f"{path}, line {line}"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({_reason(error)})") from None
        yield Row(place=place, value=value)
        at = _after_space(text, at)
        ended = text[at : at + 1] == "]"
        if not ended and text[at : at + 1] != ",":
            raise ValueError(f"{place}: not JSON (a row of the array is not followed by , or ])")
        at = _after_space(text, at + 1)
    if text[at + 1 :].strip():
        raise ValueError(f"{path}: not JSON (there is more after the array's end)")


_SPACE = re.compile(r"[ \t\n\r]*")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


# Tables


def _of_csv(path: Path) -> Iterator[Row]:
    """Cells are text, whatever they look like. Raises ValueError where quotes do not close."""
    csv.field_size_limit(sys.maxsize)  # A cell may be a whole document.
    text = text_of(path)
    if not text.strip():
        return
    reader = csv.DictReader(io.StringIO(text), strict=True)
    before = 0
    try:
        before = reader.line_num if reader.fieldnames else 0
        for value in reader:
            place, before = f"{path}, line {before + 1}", reader.line_num
            if None in value:
                yield Row(place=place, fault="has more cells than the header; quote the commas")
            else:
                yield Row(place=place, value=value)
    except csv.Error as error:
        raise ValueError(f"{path}, line {before + 1}: not CSV ({error})") from None


def _of_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from _numbered(path, (row for batch in batches for row in batch))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no parquet file, or a damaged one ({error})") from None


def _of_datasets(path: Path) -> Iterator[Row]:
    """What `datasets` saved: its train split where there are several."""
    import datasets

    try:
        if path.is_file():
            loaded = datasets.Dataset.from_file(str(path))
        else:
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded["train"]
        yield from _numbered(path, loaded)
    except Exception as error:  # The library raises what its readers do: any kind.
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: `datasets` cannot read it ({said[:300]})") from None


def _numbered(path: Path, values: Any) -> Iterator[Row]:
    for number, value in enumerate(values):
        # A column of objects has every key that one of them has, null in the others.
        row = {key: _without_nulls(inner) for key, inner in value.items()}
        yield Row(place=f"{path}, row {number}", value=row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# Plain text


def _of_text(path: Path) -> Iterator[Row]:
    """Documents are separated by two blank lines, or by one where there are no two."""
    text = text_of(path)
    parts = re.split(r"\n\s*\n\s*\n", text)
    if len(parts) < 3:
        parts = re.split(r"\n\s*\n", text)
    for number, part in enumerate(filter(None, map(str.strip, parts)), 1):
        yield Row(place=f"{path}, document {number}", value={"text": part})


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _of_json,
    ".json": _of_json,
    ".txt": _of_text,
    ".md": _of_text,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
    ".arrow": _of_datasets,
}
