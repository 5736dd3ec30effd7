"""A file that a command writes at its end, checked before it works for minutes."""

from __future__ import annotations

from pathlib import Path

from atp_edge.run.files import check_place
from atp_edge.run.records import FOLDERS

_MANIFEST, _SETTINGS = "manifest.json", "config.toml"


def new_file(path: Path | None) -> Path | None:
    """The path as it was given. Raises ValueError for a folder, for a place that cannot be
    written, and for one among files that ship, of which none may be added."""
    if path is None:
        return None
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, in it or elsewhere")
    check_place(path, str(path))
    for folder in path.absolute().parents:
        of_a_run = folder.name in FOLDERS and (folder.parent / _SETTINGS).is_file()
        if of_a_run or (folder / _MANIFEST).is_file():
            raise ValueError(f"{path} lies in {folder}, which ships as it is; name another place")
    return path
