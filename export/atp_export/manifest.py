"""Where a shipped folder comes from, and whether it is still what was shipped.

It finds damage and what was added, not a forger: the manifest is not signed, so whoever can change
the files can write it anew. Its own SHA-256, told by other means, shows that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from atp_edge.run.files import write_atomically

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One file as the manifest lists it."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """provenance: where the folder comes from; files: by their path in it, with slashes."""

    provenance: dict[str, str]
    files: dict[str, Shipped]


def write_manifest(folder: Path, metadata: Mapping[str, str]) -> None:
    """manifest.json: the provenance, and the SHA-256 and size of every file of the folder."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    content = {"schema": SCHEMA, "provenance": dict(metadata), "files": files}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def verify_manifest(folder: Path) -> dict[str, str]:
    """The provenance of a shipped folder, when its files are those that the manifest lists, byte by
    byte, and no others. Raises ValueError naming the first that differs."""
    manifest = read_manifest(folder)
    check_sizes(folder)
    for name, expected in manifest.files.items():
        if file_sha256(folder / name) != expected.sha256:
            raise ValueError(
                f"{folder / name} is not what was shipped (its SHA-256 is not "
                f"{expected.sha256[:12]}…): ship it again"
            )
    for name in unlisted(folder):
        raise ValueError(
            f"{folder / name} was not shipped: {folder / MANIFEST} does not list it; remove "
            "it, or ship the folder again"
        )
    return manifest.provenance


def unlisted(folder: Path) -> list[str]:
    """What lies in a shipped folder and is not of it, by path in the folder."""
    listed = {MANIFEST, *read_manifest(folder).files}
    return [name for name in _entries(folder) if name not in listed]


def check_sizes(folder: Path) -> None:
    """Whether all that was shipped is there in full, without reading it. Raises ValueError."""
    for name, expected in read_manifest(folder).files.items():
        size = _regular(folder, name).stat().st_size
        if size != expected.bytes:
            raise ValueError(
                f"{folder / name} ({size} bytes) is not what was shipped ({expected.bytes} bytes): "
                "ship it again"
            )


def read_manifest(folder: Path) -> Manifest:
    """Raises ValueError, naming the place, for one that is missing or of another form."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} holds no {MANIFEST}: it was not written by `atp-edge export`")
    regular = _regular(folder, MANIFEST)
    try:
        raw = json.loads(regular.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON text: {error}; ship the folder again") from error
    return _parsed(raw, path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(raw: Any, path: Path) -> Manifest:
    def wanted(right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{path} is no manifest of atp-edge: {what}; ship the folder again")

    wanted(isinstance(raw, dict), "expected an object")
    wanted(raw.get("schema") == SCHEMA, f"schema {raw.get('schema')!r}, expected {SCHEMA}")
    provenance, files = raw.get("provenance"), raw.get("files")
    texts = isinstance(provenance, dict) and all(isinstance(x, str) for x in provenance.values())
    wanted(texts, "provenance: expected texts by name")
    wanted(isinstance(files, dict) and bool(files), "files: expected one or more, by name")
    for name, about in files.items():
        wanted(_inside(name), f"files: {name!r} leads out of the folder")
        wanted(_is_shipped(about), f"files: {name!r}: expected its bytes and its sha256")
    shipped = {n: Shipped(sha256=x["sha256"], bytes=x["bytes"]) for n, x in files.items()}
    return Manifest(provenance=provenance, files=shipped)


def _is_shipped(about: Any) -> bool:
    if not isinstance(about, dict) or type(about.get("bytes")) is not int:
        return False
    return re.fullmatch("[0-9a-f]{64}", str(about.get("sha256"))) is not None


def _inside(name: str) -> bool:
    """Whether a listed name is a plain path below the folder."""
    path = PurePosixPath(name)
    plain = name == str(path) and not any(c in name for c in "\\\0:")
    return plain and not path.is_absolute() and ".." not in path.parts and name != "."


def _regular(folder: Path, name: str) -> Path:
    """A regular file of the folder: nothing else is ever opened, and nothing outside is."""
    path = folder / name
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; the manifest lists it: ship the folder again"
        ) from None
    if not stat.S_ISREG(kind):
        raise ValueError(f"{path} is no regular file: it was not written by `atp-edge export`")
    real = path.resolve()
    if not any(real.is_relative_to(at) for at in _own_places(folder)):
        raise ValueError(f"{path} leads to {real}, out of the folder: put the file itself there")
    return path


def _own_places(folder: Path) -> list[Path]:
    """The folder, and the store behind it where it is a snapshot of the Hub's cache: there every
    file is a link to `../../blobs`."""
    real = folder.resolve()
    snapshot = real.parent.name == "snapshots"
    return [real, real.parents[1] / "blobs"] if snapshot else [real]


def _entries(folder: Path) -> Iterator[str]:
    """Paths of all that lies in a folder but plain folders, in order; no link is followed."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted(files + links):
            yield (Path(root) / name).relative_to(folder).as_posix()
