"""Files written beside and renamed into place, so that nothing is ever half-written, and locks."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from atp_edge.run.errors import TakenError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def file_atomically(path: Path) -> Iterator[Path]:
    """A path beside `path`, renamed into place when the block ends without an error.

    Raises OSError, which says how much room there is, when the file does not fit.
    """
    with _beside(path) as beside:
        yield beside
        beside.replace(path)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, renamed into place when the block ends without an error.

    Raises OSError, which says how much room there is, when the files in it do not fit.
    """
    with _beside(path) as beside:
        beside.mkdir()
        yield beside
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside `path` and rename it into place."""
    with file_atomically(path) as beside:
        beside.write_text(text)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A free name beside `path`, in a folder that is there; what an error leaves is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    _remove(beside)
    try:
        yield beside
    except Exception as error:
        _remove(beside)
        if _lacks_room(error):
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                f"no room for {path}: with what was written of it removed again, {free / 1e6:,.0f} "
                "MB are free there; make room and call it again, or name another folder"
            ) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lacks_room(error: BaseException | None) -> bool:
    """Whether a write failed for want of room, by its error number: safetensors has it in its text,
    and torch's own error comes on top of the one that has it."""
    if error is None:
        return False
    named = re.search(r"os error (\d+)", str(error))
    number = int(named[1]) if named else getattr(error, "errno", None)
    return number in NO_ROOM or _lacks_room(error.__context__)


@contextmanager
def file_lock(path: Path, *, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Keep other processes from `path` while the block runs, by a lock beside it.

    The system lifts the lock of a process that is killed. waiting: called where another process
    holds it, before waiting until that one ends. Raises TakenError where none is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise TakenError(
                f"another process works on {path}; wait until it ends, or name another folder"
            ) from None
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one when there is no file."""
    loaded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file beside `path` and rename it into place."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def update_json(path: Path, section: str, value: Any) -> None:
    """Set one section of a JSON file; the others stay, also those that a process adds meanwhile."""
    with file_lock(path, waiting=lambda: None):
        write_json(path, read_json(path) | {section: value})
