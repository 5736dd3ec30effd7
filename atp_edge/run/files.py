"""Files written beside and renamed into place, so that nothing is ever half-written, and locks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from atp_edge.run.errors import TakenError

_UMASK = os.umask(0)
os.umask(_UMASK)  # There is no way to read it but to set it.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def file_atomically(path: Path) -> Iterator[Path]:
    """A path beside `path`, renamed into place when the block ends without an error.

    It is on the disk before it has the name. Raises OSError, which says how much room there is,
    when the file does not fit.
    """
    with _beside(path) as beside:
        yield beside
        _as_umask_says(beside)
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, renamed into place when the block ends without an error.

    The old folder is set aside until the new one has its name: a kill leaves either, and `settle`
    puts right what it leaves. Raises OSError, which says how much room there is, when the files do
    not fit.
    """
    settle(path)
    with _beside(path) as beside:
        beside.mkdir()
        yield beside
        for made in (*beside.rglob("*"), beside):
            _as_umask_says(made)
            _sync(made)
        if os.path.lexists(path):
            path.rename(_aside(path))
        beside.rename(path)
        _sync(path.parent)
    _remove(_aside(path))


def check_place(path: Path, named: str) -> None:
    """Raise ValueError where nothing can be written at a path, nor beside it: a file is in the
    place of a folder above, or that folder is not ours. named: the path, as it was asked for."""
    above = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise ValueError(f"{named}: {above} is a file; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{named}: {above} may not be written to; name another place")


def settle(path: Path) -> None:
    """Put right what a kill left of `folder_atomically`: the old folder back, if no new one has
    its name."""
    _remove(_partial(path))
    if os.path.lexists(path):
        _remove(_aside(path))
    elif os.path.lexists(_aside(path)):
        _aside(path).rename(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside `path` and rename it into place. What UTF-8 has no bytes for, as
    the name of a file may hold, becomes a `?`."""
    with file_atomically(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A free name beside `path`, in a folder that is there; what an error leaves is put right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _partial(path)
    _remove(beside)
    try:
        yield beside
    except BaseException as error:
        settle(path)
        if _lacks_room(error):
            free = shutil.disk_usage(path.parent).free
            raise OSError(
                f"no room for {path}: with what was written of it removed again, {free / 1e6:,.0f} "
                "MB are free there; make room and call it again, or name another folder"
            ) from error
        raise


def _as_umask_says(path: Path) -> None:
    """Give a file or folder the mode of a new one: some libraries write files for their owner
    alone."""
    if not path.is_symlink():
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    if os.name == "nt":  # It opens no folder, and syncs nothing that is open to be read.
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
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
    named = path.resolve()  # `.` has no name
    named.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(named.with_name(f".{named.name}.lock"))
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
    """The JSON object in a file, or an empty one when there is no file.

    Raises ValueError naming the file when it holds anything else.
    """
    if not path.exists():
        return {}
    try:
        loaded = json.loads(path.read_bytes())
        if not isinstance(loaded, dict):
            raise ValueError(f"expected an object, found {type(loaded).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); put it back, or delete it and what it held is made again"
        ) from None
    return loaded


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file beside `path` and rename it into place."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def update_json(path: Path, section: str, value: Any) -> None:
    """Set one section of a JSON file; the others stay, also those that a process adds meanwhile."""
    with file_lock(path, waiting=lambda: None):
        write_json(path, read_json(path) | {section: value})


def drop_from_json(path: Path, sections: Collection[str]) -> None:
    """Remove sections of a JSON file, where it has them."""
    with file_lock(path, waiting=lambda: None):
        held = read_json(path)
        if held.keys() & set(sections):
            write_json(path, {k: v for k, v in held.items() if k not in sections})
