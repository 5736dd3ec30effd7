"""SHA-256 of files, of folders and of values."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_MANIFEST = "manifest.json"
# A file that changed so lately may change again without its times telling: it is read every time.
_SETTLED_NS = 100_000_000
_known: dict[tuple[str, int, int, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """Of a file's bytes, read once a process as long as the file is the same one, unchanged."""
    stat = path.stat()
    key = (str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _known or time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]


def files_sha256(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Of every file that these names under `root` are or hold; what is not there has none.

    Hidden files and Python's own caches are left out, but not of a folder with a manifest: that
    lists all that may lie there.
    """
    found = {}
    for name in names:
        path = root / name
        listed = (path / _MANIFEST).is_file()
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            parts = file.relative_to(path).parts
            hidden = any(p.startswith((".", "__pycache__")) for p in parts)
            if file.is_file() and (listed or not hidden):
                found[file.relative_to(root).as_posix()] = file_sha256(file)
    return found


def value_sha256(value: Any) -> str:
    """Of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def combined_sha256(files: Mapping[str, str]) -> str:
    """One for several files: a single file's own, else that of what `sha256sum` would print."""
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first file that is not what it was, and how; None when all are."""
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if after is None:
            return f"{name} is gone"
        if before is None:
            return f"{name} is new"
        if before != after:
            return f"{name} changed (SHA-256 {before[:12]}… then, {after[:12]}… now)"
    return None
