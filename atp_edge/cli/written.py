"""A file that a command writes at its end, checked before it works for minutes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from atp_edge.run.files import check_place
from atp_edge.run.records import FOLDERS, HISTORY, MEMORY, METRICS, PLAN, REPORT, WORK

_MANIFEST, _SETTINGS = "manifest.json", "config.toml"
_OF_A_RUN = frozenset(
    {
        *(_SETTINGS, "inputs.json", "stages.json", "checkpoint"),
        *(METRICS, PLAN, MEMORY, HISTORY, REPORT),
        *WORK["gate"].writes,
    }
)


def new_file(path: Path | None) -> Path | None:
    """The path as it was given. Raises ValueError for a folder or a device, for a place that cannot
    be written, for a run's own file, and for a place among files that ship, of which none may be
    added."""
    if path is None:
        return None
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, in it or elsewhere")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or the like, and would be replaced; name a file")
    check_place(path, str(path))
    place = path.resolve()
    for folder in place.parents:
        own = place.relative_to(folder).parts[0]
        of_a_run = (folder / _SETTINGS).is_file()
        if (of_a_run and own in FOLDERS) or (folder / _MANIFEST).is_file():
            shipped = folder / own if of_a_run else folder
            raise ValueError(f"{path} lies in {shipped}, which ships as it is; name another place")
        if of_a_run and own in _OF_A_RUN:
            raise ValueError(f"{path} is the run's own; name another place")
    return path


def check_apart(written: Mapping[str, Path | None], read: Iterable[str | Path] = ()) -> None:
    """Raise ValueError where a file to be written, by its flag, is another one, is one that the
    command reads, or lies in a folder that it reads."""
    seen: dict[Path, str] = {}
    there = [Path(path) for path in read if path and Path(path).exists()]
    for flag, path in written.items():
        if path is None:
            continue
        place = path.resolve()
        if place in seen:
            raise ValueError(f"{seen[place]} and {flag} both name {path}; name two files")
        seen[place] = flag
        for file in there:
            within = file.is_dir() and file.resolve() in place.parents
            if within or (path.exists() and path.samefile(file)):
                raise ValueError(f"{flag} {path}: {file} is read here; name another place")


def sources_of(out: Path) -> list[str]:
    """The model, the text and the files that a run's settings name. Raises ValueError where the
    folder holds no run."""
    from atp_edge.run.folder import RunFolder

    config = RunFolder(out).config()
    return [config.model, config.data, config.protect, config.gate.config]
